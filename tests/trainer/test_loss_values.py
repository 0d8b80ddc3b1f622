"""An objective of one's own by its import path, and a correction as a table: in the file, as an option, in a run."""

import sys

import pytest
from minirl import run
from minirl.cli import main
from minirl.config_file import dump_config, load_config
from minirl.errors import MiniRLError

from minirl_kernels import Correction, PolicyLossConfig

OWN = """
from dataclasses import dataclass
from minirl_kernels.objectives import Objective, times

@dataclass(frozen=True, kw_only=True)
class Mine(Objective):
    preset = {"rollout_is": None, "rollout_is_threshold": None, "loss_agg_mode": "token-mean"}
    scale: float = 1.0

    def __post_init__(self):
        if self.scale <= 0:
            raise ValueError(f"scale is {self.scale}: it must be above 0")

    def loss(self, token):
        term = times(-self.scale * token.r, token.advantages)
        return term, term

not_a_class = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The class Mine of the module own_losses, which stands beside the configuration."""
    (tmp_path / "own_losses.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_losses", raising=False)
    from own_losses import Mine

    yield Mine
    sys.modules.pop("own_losses", None)


@pytest.fixture
def load(tmp_path):
    def load(text):
        path = tmp_path / "loss.toml"
        path.write_text(text)
        return load_config(path)

    return load


def test_a_path_is_the_class_with_its_preset(own, load):
    config = load('[policy_loss]\nobjective = "own_losses:Mine"\n')
    assert config.policy_loss == PolicyLossConfig.preset(own())
    assert load(dump_config(config)) == config


def test_a_table_has_its_fields_and_a_named_preset_its_defaults(own, load):
    config = load('preset = "grpo"\n[policy_loss.objective]\nclass = "own_losses:Mine"\nscale = 2\n')
    assert config.policy_loss == PolicyLossConfig.grpo(objective=own(scale=2.0))
    assert load(dump_config(config)) == config


def test_a_correction_is_a_table(load):
    config = load(
        'preset = "grpo"\n[policy_loss.rollout_is]\nlevel = "sequence"\nupper = 2\nbeyond = "mask_response"\n'
    )
    correction = Correction(level="sequence", upper=2.0, beyond="mask_response")
    assert config.policy_loss == PolicyLossConfig.grpo(rollout_is=correction)
    assert load(dump_config(config)) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('objective = "ppo"', "policy_loss.objective is 'ppo': it must be one of 'minirl', 'reinforce'"),
        ("objective = 3", "policy_loss.objective is 3: it must be one of"),
        ('objective = "no_such_module:Mine"', "'no_such_module:Mine', which does not import (No module named"),
        ('objective = "own_losses:Other"', "'own_losses:Other', which does not import (module 'own_losses' has no"),
        ('objective = "own_losses:not_a_class"', "'own_losses:not_a_class': it must be a class derived from"),
        ('objective = {class = "own_losses:Mine", scal = 2}', "unknown key policy_loss.objective.scal: did you mean"),
        (
            'objective = {class = "own_losses:Mine", scale = "2"}',
            "policy_loss.objective.scale is '2': it must be a num",
        ),
        (
            'objective = {class = "own_losses:Mine", scale = 0}',
            "policy_loss.objective.scale is 0.0: it must be above 0",
        ),
        ("objective = {scale = 2}", "policy_loss.objective is None: it must be one of"),
        ('objective = {class = "own_losses:Mine"}\nclip = false', "policy_loss.clip is False with objective=Mine("),
        ('rollout_is = "tok"', "policy_loss.rollout_is is 'tok': it must be one of 'token', 'sequence'"),
        (
            "rollout_is = {uper = 2}",
            "unknown key policy_loss.rollout_is.uper: did you mean policy_loss.rollout_is.upper",
        ),
        ("rollout_is = {upper = -2}", "policy_loss.rollout_is.upper is -2.0: it must be above 0"),
    ],
)
def test_refused_by_the_loader(own, load, text, message):
    with pytest.raises(MiniRLError) as error:
        load(f"[policy_loss]\n{text}\n")
    assert message in str(error.value)


def test_a_mean_over_the_mini_batch_is_refused_in_training(load):
    config = load('preset = "grpo"\n[policy_loss]\nrollout_is = {normalise = true}\n[model]\npath = "somewhere"\n')
    with pytest.raises(MiniRLError, match=r"^policy_loss\.rollout_is\.normalise is true: it must be false"):
        config.check()


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        (["--policy-loss.objective", "cispo"], {"objective": "cispo"}),
        (["--policy-loss.rollout-is", "none"], {"rollout_is": None}),
        (["--policy-loss.rollout-is", "None"], {"rollout_is": None}),
        (["--policy-loss.rollout-is", "sequence"], {"rollout_is": "sequence"}),
        (["--policy-loss.rollout-is", "{upper = 3}"], {"rollout_is": Correction(upper=3.0)}),
    ],
)
def test_options(config_file, monkeypatch, options, changed):
    assert trained_with(config_file, monkeypatch, options) == PolicyLossConfig.grpo(**changed)


def test_own_class_as_an_option(own, config_file, monkeypatch):
    for value, objective in (("own_losses:Mine", own()), ('{class = "own_losses:Mine", scale = 3}', own(scale=3.0))):
        config = trained_with(config_file, monkeypatch, ["--policy-loss.objective", value])
        assert config == PolicyLossConfig.grpo(objective=objective)


def trained_with(config_file, monkeypatch, options):
    """The policy_loss that `minirl train` would train with, where the file has GRPO."""
    seen = []

    def train(config, *_, **__):
        seen.append(config.policy_loss)
        raise SystemExit(0)

    monkeypatch.setattr(run, "train", train)
    with pytest.raises(SystemExit):
        main(["train", str(config_file(preset="grpo", policy_loss=PolicyLossConfig.grpo())), *options])
    return seen[0]


def test_an_option_that_does_not_import_is_refused(config_file, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", str(config_file()), "--policy-loss.objective", "no_such_module:Mine"])
    assert stop.value.code == 2
    assert "no_such_module:Mine" in capsys.readouterr().err


def test_a_run_with_an_own_class(own, config_file, tmp_path):
    main(["train", str(config_file(policy_loss=PolicyLossConfig.preset(own(scale=2.0))))])
    assert load_config(tmp_path / "run" / "config.toml").policy_loss.objective == own(scale=2.0)
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
