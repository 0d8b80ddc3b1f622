"""PolicyLossConfig: the presets' values as the papers have them, and what is refused."""

import dataclasses
import math

import pytest

from minirl_kernels import PolicyLossConfig

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


def test_the_default_is_minirl():
    assert PolicyLossConfig() == PolicyLossConfig.minirl()


def test_overrides_and_ablations():
    assert PolicyLossConfig.preset("grpo", clip_ratio_high=0.28).clip_ratio_high == 0.28
    assert PolicyLossConfig.cispo(rollout_is="token", rollout_is_threshold=2).rollout_is_threshold == 2
    for ablation in ({"loss_agg_mode": "seq-mean-token-mean"}, {"rollout_is": None}, {"clip": False}):
        assert PolicyLossConfig.minirl(**ablation) == dataclasses.replace(PolicyLossConfig(), **ablation)


def test_it_is_a_value():
    """Frozen and hashable: torch.compile guards on it, and a default argument may be one."""
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
    """Each message names the field, what it was and what it must be."""
    with pytest.raises(error, match=rf"^{named}\b.*{was}.*must be.*{must_be}"):
        PolicyLossConfig(**fields)


def test_unknown_preset_and_field():
    with pytest.raises(ValueError, match=r"^preset is 'ppo': it must be one of 'minirl', .*'gspo'"):
        PolicyLossConfig.preset("ppo")
    with pytest.raises(TypeError, match=r"no field 'clip_ratio': it must be one of objective, clip, "):
        PolicyLossConfig.grpo(clip_ratio=0.2)
