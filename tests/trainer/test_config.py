"""The configuration file: its values, and one message with the key for an invalid value."""

import typing

import pytest
from minirl.config import TrainConfig
from minirl.config_file import dump_config, load_config
from minirl.errors import MiniRLError

from minirl_kernels import PolicyLossConfig

MODEL = '[model]\npath = "somewhere"\n'


@pytest.fixture
def load(tmp_path):
    def load(text, **options) -> TrainConfig:
        path = tmp_path / "config.toml"
        path.write_text(text)
        return load_config(path, **options)

    return load


def test_leaves_out_is_default(load):
    assert load("") == TrainConfig()


def test_types_that_fit(load):
    config = load('threads = "none"\n[optimizer]\nlr = 1\nbetas = [0, 0.5]\n[model.config]\nhidden_size = 8\n')
    assert config.threads is None
    assert config.optimizer.lr == 1.0
    assert type(config.optimizer.lr) is float
    assert config.optimizer.betas == (0.0, 0.5)
    assert config.model.config == {"hidden_size": 8}


@pytest.mark.parametrize("preset", typing.get_args(typing.get_type_hints(TrainConfig)["preset"]))
def test_written_and_read_again(load, preset):
    config = load(f'preset = "{preset}"\n{MODEL}')
    assert config.policy_loss == PolicyLossConfig.preset(preset)
    assert load(dump_config(config)) == config


def test_policy_loss_changes_single_fields_of_the_preset(load):
    text = 'preset = "grpo"\n[policy_loss]\nclip_ratio_high = 0.5\nrollout_is = "token"\nrollout_is_threshold = 2\n'
    changed = {"clip_ratio_high": 0.5, "rollout_is": "token", "rollout_is_threshold": 2.0}
    assert load(text).policy_loss == PolicyLossConfig.grpo(**changed)
    assert load(text, preset="minirl").policy_loss == PolicyLossConfig(**changed)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz = 3", "unknown key stepz: did you mean steps?"),
        ("[rollout]\ntop_p = 0.9", "rollout.top_p is not an option: it must be left out"),
        ("[optimizer]\nlearning_rate = 3", "unknown key optimizer.learning_rate: it must be one of lr,"),
        (
            "[policy_loss]\nclip_ratio = 0.2",
            "unknown key policy_loss.clip_ratio: did you mean policy_loss.clip_ratio_low?",
        ),
        ('steps = "many"', "steps is 'many': it must be an integer"),
        ("steps = 2.5", "steps is 2.5: it must be an integer"),
        ("steps = true", "steps is True: it must be an integer"),
        ("run_dir = 3", "run_dir is 3: it must be a string"),
        ('threads = "two"', "threads is 'two': it must be an integer or \"none\""),
        ('[optimizer]\nlr = "1e-4"', "optimizer.lr is '1e-4': it must be a number"),
        ("[optimizer]\nbetas = 0.9", "optimizer.betas is 0.9: it must be a list of 2 numbers"),
        ('[optimizer]\nbetas = [0.9, "x"]', "optimizer.betas is 'x': it must be a number"),
        ("[policy_loss]\nclip = 1", "policy_loss.clip is 1: it must be true or false"),
        ('[task]\nkind = "chess"', "task.kind is 'chess': it must be one of 'arithmetic', 'jsonl'"),
        ("optimizer = 3", "optimizer is 3: it must be a table, [optimizer]"),
        ("policy_loss = 3", "policy_loss is 3: it must be a table, [policy_loss]"),
        ("[model]\nconfig = 3", "model.config is 3: it must be a table"),
        ('preset = "ppo"', "preset is 'ppo': it must be one of 'minirl'"),
        ("[policy_loss]\nrollout_is_threshold = -1", "policy_loss.rollout_is_threshold is -1.0: it must be above 0"),
        ('preset = "reinforce"\n[policy_loss]\nclip = true', "policy_loss.clip is True with objective='reinforce'"),
        ("steps = ", "is not valid TOML: Invalid value"),
    ],
)
def test_refused_by_the_loader(load, text, message):
    with pytest.raises(MiniRLError) as error:
        load(text)
    assert message in str(error.value)
    assert "config.toml" in str(error.value)


def test_file_that_cannot_be_read(tmp_path):
    with pytest.raises(MiniRLError, match=r"cannot read the config file .*nowhere\.toml: No such file"):
        load_config(tmp_path / "nowhere.toml")
    (tmp_path / "latin.toml").write_bytes(b'run_dir = "\xe9"')
    with pytest.raises(MiniRLError, match=r"cannot read the config file .*latin\.toml: .*utf-8"):
        load_config(tmp_path / "latin.toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "model.path is None and model.config has 0 keys: exactly one of the two must be given"),
        (f"{MODEL}config = {{hidden_size = 8}}", "model.path is 'somewhere' and model.config has 1 keys"),
        (f"steps = 0\n{MODEL}", "steps is 0: it must be at least 1"),
        (f"threads = 0\n{MODEL}", "threads is 0: it must be at least 1, or none"),
        (f"[rollout]\ngroup_size = 1\n{MODEL}", "rollout.group_size is 1: it must be at least 2"),
        (f"[rollout]\ntemperature = 0\n{MODEL}", "rollout.temperature is 0.0: it must be above 0"),
        (f"[optimizer]\nlr = -1\n{MODEL}", "optimizer.lr is -1.0: it must be above 0"),
        (f"[optimizer]\nlr = nan\n{MODEL}", "optimizer.lr is nan: it must be above 0"),
        (f"[optimizer]\nbetas = [0.9, 1.0]\n{MODEL}", "optimizer.betas is (0.9, 1.0): it must be in [0, 1)"),
        (f"[task]\nheld_out_fraction = 1\n{MODEL}", "task.held_out_fraction is 1.0: it must be between 0 and 1"),
        (f"[task]\nmax_operand = 5000\n{MODEL}", "task.max_operand is 5000: it must be between 1 and 999"),
        (f'[task]\nkind = "jsonl"\n{MODEL}', "task.path is none with task.kind='jsonl'"),
        (f'[task]\npath = "x"\n{MODEL}', "task.path is 'x' with task.kind='arithmetic': the kind must be 'jsonl'"),
        ('[task]\nkind = "jsonl"\npath = "x"\n[model.config]\na = 1', "model.path is none with task.kind='jsonl'"),
        (
            f'preset = "cispo"\nmicro_batch_size = 12\n{MODEL}',
            "micro_batch_size is 12 with loss_agg_mode='group-token-mean': it must be a multiple of rollout.group_size",
        ),
    ],
)
def test_refused_by_check(load, text, message):
    config = load(text)
    with pytest.raises(MiniRLError) as error:
        config.check()
    assert message in str(error.value)


def test_advantages_follow_the_preset(load):
    assert not load("").advantages_by_std
    assert load('preset = "grpo"').advantages_by_std
    assert not load('preset = "grpo"\nnorm_advantages_by_std = false').advantages_by_std
