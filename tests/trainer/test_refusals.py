"""Invalid settings end with one message and status 2, before any work."""

import importlib.metadata
import json
import shlex

import pytest
from command import fails
from minirl import evaluate as evaluate_module
from minirl.cli import main
from minirl.config import ModelConfig
from minirl.config_file import dump_config, load_config
from tiny_run import TINY_MODEL

import minirl_kernels


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"hidden_size": 193}, "model.config makes no Qwen3MoeForCausalLM that computes: strides should be multiple"),
        ({"num_experts_per_tok": 20}, "model.config makes no Qwen3MoeForCausalLM that computes: selected index k out"),
        ({"num_key_value_heads": 3}, "model.config makes no Qwen3MoeForCausalLM that computes: "),
        ({"head_dim": 15}, "minirl: model.config"),
        ({"hidden_size": -4}, "minirl: model.config"),
        ({"hidden_act": "nope"}, "minirl: model.config"),
        ({"rope_parameters": {"rope_type": "nope"}}, "minirl: model.config"),
        ({"initializer_range": float("nan")}, "minirl: model.config"),
        ({"rms_norm_eps": float("nan")}, "model.config makes a Qwen3MoeForCausalLM whose logits are NaN"),
        ({"model_type": ["qwen3_moe"]}, "model.config.model_type is ['qwen3_moe']: it must be a causal language model"),
        ({"model_type": "musicgen"}, "minirl: model.config"),
    ],
)
def test_sizes_that_make_no_model(config_file, capsys, keys, message):
    path = config_file(model=ModelConfig(config={**TINY_MODEL, **keys}))
    assert message in fails(capsys, "train", path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--optimizer.lr inf", "optimizer.lr is inf: it must be finite"),
        ("--optimizer.lr 1e400", "optimizer.lr is inf: it must be finite"),
        ("--rollout.temperature inf", "rollout.temperature is inf: it must be finite"),
        ("--rollout.temperature nan", "rollout.temperature is nan: it must be above 0"),
        ("--optimizer.max-grad-norm inf", "optimizer.max_grad_norm is inf: it must be finite"),
        ("--optimizer.weight-decay inf", "optimizer.weight_decay is inf: it must be finite"),
        ("--cold-start.lr inf", "cold_start.lr is inf: it must be finite"),
        ("--policy-loss.clip-ratio-high inf", "policy_loss.clip_ratio_high is inf: it must be finite"),
        ("--policy-loss.rollout-is-threshold inf", "policy_loss.rollout_is_threshold is inf: it must be finite"),
        ("--policy-loss.kl-coef nan", "kl_coef is nan: it must be finite"),
        ("--threads 1000000000000", "threads is 1000000000000: it must be at most 1024"),
        ("--task.max-operand 1 --task.held-out-fraction 1e-9", "task.held_out_fraction is 1e-09, which leaves no"),
        ("--run-dir ''", "run_dir is '': it must be a path"),
        ("--run-dir config.toml", "run_dir config.toml cannot be written to: File exists"),
        ("--model.path ./nowhere", "cannot load a model from ./nowhere: there is no such folder"),
        ("--rollout.top_p 0.9", "rollout.top_p is not an option: it must be left out, since rollouts are sampled from"),
        ("--rollout.top-k=50", "rollout.top-k is not an option: it must be left out"),
        ("--steps many", "--steps"),
        ("--optimizer.betas 1", "--optimizer.betas"),
    ],
)
def test_options_of_train(config_file, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert message in fails(capsys, "train", config_file(), *shlex.split(options))
    assert {path.name for path in tmp_path.iterdir()} <= {"config.toml", "run"}
    assert not (tmp_path / "run" / "config.toml").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1, 2]", "line 2: [1, 2] must be an object with phase and step"),
        ("3", "line 2: 3 must be an object with phase and step"),
        ("null", "line 2: null must be an object with phase and step"),
        ('{"phase": "train"}', 'line 2: {"phase": "train"} must be an object with phase and step'),
        ('{"phase": "train", "step": "a"}', "line 2: step is 'a': it must be a number"),
        ('{"phase": "train", "step": 1, "entropy": null}', "line 2: entropy is None: it must be a number"),
        ('{"phase": "train", "step": 1, "ent', "line 2: not valid JSON"),
        ("\xff", "can't decode byte 0xff"),
    ],
)
def test_plot_of_metrics_that_are_none(run_folder, capsys, line, message):
    good = json.dumps({"phase": "train", "step": 0, "entropy": 1.0})
    (run_folder / "metrics.jsonl").write_bytes(f"{good}\n{line}\n".encode("latin-1"))
    assert message in fails(capsys, "plot", run_folder)


@pytest.mark.parametrize("command", [("eval",), ("discrepancy",), ("discrepancy", "--pi.routing-replay", "R2")])
def test_a_run_that_has_not_ended(run_folder, capsys, command):
    name, *options = command
    (run_folder / "model").rename(run_folder / "model-of-tomorrow")
    said = fails(capsys, name, run_folder, *options)
    assert f"{run_folder} holds no model yet: it must be the folder of a run that has ended" in said


def test_a_run_whose_configuration_was_changed_to_nonsense(run_folder, capsys):
    text = (run_folder / "config.toml").read_text()
    (run_folder / "config.toml").write_text(text.replace("temperature = 1.0", "temperature = inf"))
    for command in ("eval", "discrepancy"):
        assert "rollout.temperature is inf: it must be finite" in fails(capsys, command, run_folder)


def test_a_run_that_has_been_moved_is_evaluated_where_it_is(run_folder, capsys, monkeypatch, tmp_path):
    """The engine's log must go to the new folder, not to the old place."""
    seen = []
    make_sampler = evaluate_module.make_sampler
    monkeypatch.setattr(
        evaluate_module,
        "make_sampler",
        lambda config, *rest: seen.append(config.run_dir) or make_sampler(config, *rest),
    )
    run_folder.rename(tmp_path / "moved")
    main(["eval", str(tmp_path / "moved"), "--k", "1", "--prompts", "2"])
    assert seen == [str(tmp_path / "moved")]


def test_going_on_from_weights_with_the_file_that_built_them(config, config_file, run_folder, tmp_path, capsys):
    path, weights = config_file(run_dir=str(tmp_path / "next")), run_folder / "model"
    main(["train", str(path), "--steps", "1", "--model.path", str(weights)])
    written = load_config(tmp_path / "next" / "config.toml")
    assert written.model == ModelConfig(path=str(weights))
    said = fails(capsys, "train", path, "--model.path", weights, "--model.config.hidden-size", "3")
    assert "--model.config.hidden-size" in said

    path.write_text(dump_config(config).replace('path = "none"', f'path = "{weights}"', 1))
    said = fails(capsys, "train", path)
    assert f"model.path is '{weights}' and model.config has 12 keys: exactly one of the two must be given" in said


def test_version(capsys):
    main(["--version"])
    version = importlib.metadata.version("minirl-kernels")
    assert capsys.readouterr().out == f"minirl {version}\n"
    assert minirl_kernels.__version__ == version
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = minirl_kernels.nothing
