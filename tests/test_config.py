"""PolicyLossConfig: presets have the values of their papers, and invalid fields raise."""

import copy
import dataclasses
import math
import pickle
import typing

import pytest

from minirl_kernels import Correction, PolicyLossConfig
from minirl_kernels.config import ObjectiveName
from minirl_kernels.objectives import DPPO, GRPO, NAMED, SAPO, DualClip, TwoSidedClip

MINIRL = {
    "objective": "minirl",
    "clip": True,
    "clip_ratio_low": 0.2,
    "clip_ratio_high": 0.27,
    "rollout_is": "token",
    "rollout_is_threshold": 5.0,
    "loss_agg_mode": "seq-mean-token-sum",
    "loss_scale_factor": None,
    "entropy_coef": 0.0,
    "kl_coef": 0.0,
    "kl_estimator": "k3",
}
NO_ROLLOUT = {"rollout_is": None, "rollout_is_threshold": None}
PRESETS = {
    "minirl": {},
    "reinforce": {"clip": False, "rollout_is_threshold": None},
    "sequence_is": {"clip": False, "rollout_is": "sequence", "rollout_is_threshold": None},
    "grpo": {"loss_agg_mode": "seq-mean-token-mean", **NO_ROLLOUT},
    "cispo": {"loss_agg_mode": "group-token-mean", **NO_ROLLOUT},
    "gspo": {
        "loss_agg_mode": "seq-mean-token-mean",
        "clip_ratio_low": 3e-4,
        "clip_ratio_high": 4e-4,
        **NO_ROLLOUT,
    },
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    config = PolicyLossConfig.preset(name)
    assert dataclasses.asdict(config) == {**MINIRL, "objective": name, **PRESETS[name]}
    assert getattr(PolicyLossConfig, name)() == config


def test_every_named_objective_is_an_option():
    assert typing.get_args(ObjectiveName) == tuple(NAMED) == tuple(PRESETS)


def test_the_default_is_minirl():
    assert PolicyLossConfig() == PolicyLossConfig.minirl()


def test_overrides_and_ablations():
    assert PolicyLossConfig.preset("grpo", clip_ratio_high=0.28).clip_ratio_high == 0.28
    assert PolicyLossConfig.cispo(rollout_is="token", rollout_is_threshold=2).rollout_is_threshold == 2
    for ablation in ({"loss_agg_mode": "seq-mean-token-mean"}, {"rollout_is": None}, {"clip": False}):
        assert PolicyLossConfig.minirl(**ablation) == dataclasses.replace(PolicyLossConfig(), **ablation)


def test_it_is_a_value():
    """The config is frozen and hashable, so torch.compile can guard on it, and it can be a default argument."""
    config = PolicyLossConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.clip = False
    assert {config: 1}[PolicyLossConfig()] == 1
    with pytest.raises(TypeError):
        PolicyLossConfig("minirl")


@pytest.mark.parametrize(
    ("fields", "error", "named", "was", "must_be"),
    [
        ({"objective": "ppo"}, ValueError, "objective", "'ppo'", "'minirl', 'reinforce', 'sequence_is'"),
        ({"objective": None}, ValueError, "objective", "None", "'minirl'"),
        (
            {"loss_agg_mode": "mean"},
            ValueError,
            "loss_agg_mode",
            "'mean'",
            "'seq-mean-token-sum', .*'group-token-mean'",
        ),
        ({"kl_estimator": "k4"}, ValueError, "kl_estimator", "'k4'", "'k1', 'k2', 'k3'"),
        ({"rollout_is": "tokens"}, ValueError, "rollout_is", "'tokens'", "'token', 'sequence', None"),
        ({"clip": 1}, TypeError, "clip", "1", "a bool"),
        ({"clip_ratio_low": -0.1}, ValueError, "clip_ratio_low", "-0.1", r"in \[0, 1\]"),
        ({"clip_ratio_low": 1.1}, ValueError, "clip_ratio_low", "1.1", r"in \[0, 1\]"),
        ({"clip_ratio_low": True}, TypeError, "clip_ratio_low", "True", "a number"),
        ({"clip_ratio_high": -1}, ValueError, "clip_ratio_high", "-1", "at least 0"),
        ({"clip_ratio_high": math.nan}, ValueError, "clip_ratio_high", "nan", "at least 0"),
        ({"clip_ratio_high": "0.2"}, TypeError, "clip_ratio_high", "'0.2'", "a number"),
        ({"rollout_is_threshold": -5.0}, ValueError, "rollout_is_threshold", "-5.0", "above 0, or None"),
        ({"rollout_is_threshold": 0}, ValueError, "rollout_is_threshold", "0", "above 0, or None"),
        ({"rollout_is_threshold": math.nan}, ValueError, "rollout_is_threshold", "nan", "above 0, or None"),
        ({"entropy_coef": math.inf}, ValueError, "entropy_coef", "inf", "finite"),
        ({"kl_coef": -0.1}, ValueError, "kl_coef", "-0.1", "at least 0"),
        ({"kl_coef": None}, TypeError, "kl_coef", "None", "a number"),
        ({"loss_agg_mode": "seq-mean-token-sum-norm"}, ValueError, "loss_scale_factor", "None", "given"),
        ({"loss_scale_factor": 10.0}, ValueError, "loss_scale_factor", "10.0", "'seq-mean-token-sum-norm'"),
        (
            {"loss_agg_mode": "seq-mean-token-sum-norm", "loss_scale_factor": 0.0},
            ValueError,
            "loss_scale_factor",
            "0.0",
            "above 0",
        ),
        ({"objective": "reinforce"}, ValueError, "clip", "True", "False"),
        ({"objective": "sequence_is", "clip": False}, ValueError, "rollout_is", "'token'", "'sequence' or None"),
        ({"objective": "grpo", "rollout_is": None}, ValueError, "rollout_is_threshold", "5.0", "None"),
    ],
)
def test_what_means_nothing_is_refused(fields, error, named, was, must_be):
    """Each error names the field, its value and the permitted values."""
    with pytest.raises(error, match=rf"^{named}\b.*{was}.*must be.*{must_be}"):
        PolicyLossConfig(**fields)


def test_unknown_preset_and_field():
    with pytest.raises(ValueError, match=r"^preset is 'ppo': it must be one of 'minirl', .*'gspo'"):
        PolicyLossConfig.preset("ppo")
    with pytest.raises(TypeError, match=r"no field 'clip_ratio': it must be one of objective, clip, "):
        PolicyLossConfig.grpo(clip_ratio=0.2)


@pytest.mark.parametrize(
    "config",
    [
        PolicyLossConfig.gspo(rollout_is=Correction(level="sequence", upper=2.0)),
        PolicyLossConfig.preset(SAPO(tau_neg=2.0)),
    ],
    ids=["by name", "by class"],
)
def test_a_copy_is_equal(config):
    for other in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config), dataclasses.replace(config)):
        assert other == config
        assert hash(other) == hash(config)
        assert other.policy_objective == config.policy_objective
    changed = dataclasses.replace(config, objective=SAPO(tau_neg=3.0), clip_ratio_low=0.2, clip_ratio_high=0.27)
    assert changed != config
    assert changed.policy_objective == SAPO(tau_neg=3.0)


def test_an_instance_brings_its_preset():
    config = PolicyLossConfig.preset(SAPO(), entropy_coef=0.1)
    assert (config.rollout_is, config.loss_agg_mode, config.entropy_coef) == (None, "seq-mean-token-mean", 0.1)
    assert PolicyLossConfig.preset(GRPO(clip_ratio_low=0.1)).policy_objective.ratio_low == 0.9


@pytest.mark.parametrize(
    ("fields", "named", "was", "must_be"),
    [
        ({"objective": SAPO}, "objective", "SAPO", "an Objective instance"),
        ({"objective": SAPO(), "clip_ratio_high": 0.3}, "clip_ratio_high", "0.3", "0.27, its default"),
        ({"objective": SAPO(), "clip": False}, "clip", "False", "True, its default"),
        ({"objective": SAPO(), "rollout_is": None}, "rollout_is_threshold", "5.0", "None"),
        ({"objective": DPPO(), "rollout_is": "sequence"}, "rollout_is", "'sequence'", "'token' or None"),
        ({"objective": DPPO(), "rollout_is": Correction(upper=2.0)}, "rollout_is", "Correction", "'token' or None"),
    ],
)
def test_what_an_instance_cannot_use_is_refused(fields, named, was, must_be):
    with pytest.raises(ValueError, match=rf"^{named}\b.*{was}.*must be.*{must_be}"):
        PolicyLossConfig(**fields)


@pytest.mark.parametrize(
    ("cls", "fields", "must_be"),
    [
        (SAPO, {"tau_neg": 0}, "above 0"),
        (DualClip, {"clip_ratio_c": 1.0}, "above 1"),
        (DualClip, {"clip_ratio_low": 1.5}, r"in \[0, 1\]"),
        (DualClip, {"log_ratio_max": -1.0}, "above 0"),
        (TwoSidedClip, {"delta": 1.2}, r"above 1 \+ clip_ratio_high, 1.27"),
        (DPPO, {"divergence_low": -0.1}, "at least 0"),
        (DPPO, {"divergence": "js"}, "one of 'tv', 'kl'"),
        (GRPO, {"clip_ratio_high": -0.1}, "at least 0"),
    ],
)
def test_the_fields_of_an_objective_are_checked(cls, fields, must_be):
    (name,) = fields
    with pytest.raises(ValueError, match=rf"^{name} is .*: it must be {must_be}"):
        cls(**fields)
