"""The command makes a loadable folder from a configuration, and prints one message for an error."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command import fails
from minirl.cli import main
from minirl.config import ColdStartConfig, ModelConfig, TaskConfig
from minirl.config_file import load_config
from transformers import AutoModelForCausalLM, AutoTokenizer

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def metrics_of(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("seconds_")} for line in lines]


@pytest.fixture
def trained(config_file, tmp_path, capsys):
    main(["train", str(config_file())])
    return tmp_path / "run", capsys.readouterr().out


def test_train_leaves_a_run(trained):
    run, said = trained
    assert {path.name for path in run.iterdir()} == {
        "config.toml",
        "metrics.jsonl",
        "curves.png",
        "tensorboard",
        "model",
    }
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "model" / "model.safetensors").is_file()
    assert list((run / "tensorboard").iterdir())
    for name in ("model", "curves.png", "metrics.jsonl", "config.toml"):
        assert str(run / name) in said
    assert "training 2/2  reward" in said
    assert "\x1b" not in said  # a log is not a terminal

    lines = metrics_of(run)
    assert [(line["phase"], line["step"]) for line in lines] == [
        ("cold_start", 1),
        ("cold_start", 2),
        ("train", 0),
        ("train", 1),
        ("train", 2),
    ]
    assert all("reward_held_out" in line for line in lines[2:])
    assert {"reward_train", "entropy", "grad_norm", "staleness_kl_k3", "discrepancy_kl_k3"} <= set(lines[-1])


def test_model_folder_loads_with_transformers(trained):
    folder = trained[0] / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer("12+7=", return_tensors="pt").input_ids
    assert model(ids).logits.shape == (1, 5, len(tokenizer))


def test_eval_and_plot(trained, capsys, tmp_path, monkeypatch):
    run = str(trained[0])
    main(["eval", run, "--k", "3", "--prompts", "5"])
    assert "avg@3 on 5 held-out prompts: 0." in capsys.readouterr().out
    main(["eval", run])
    assert "avg@2 on 6 held-out prompts" in capsys.readouterr().out

    (trained[0] / "curves.png").unlink()
    main(["plot", run])
    assert (trained[0] / "curves.png").is_file()
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, tmp_path / "copy")
    main(["plot", run, "copy"])
    assert (tmp_path / "curves.png").is_file()
    main(["plot", run, "--output", "figures/one.png"])
    assert (tmp_path / "figures" / "one.png").is_file()


def test_run_again_from_its_own_config_gives_the_same_curve(trained, tmp_path):
    run, other = trained[0], tmp_path / "other"
    main(["train", str(run / "config.toml"), "--run-dir", str(other)])
    assert metrics_of(other) == metrics_of(run)
    expected, weights = (AutoModelForCausalLM.from_pretrained(path / "model").state_dict() for path in (run, other))
    assert all(torch.equal(expected[name], weights[name]) for name in expected)


def test_options_have_the_last_word(config_file, tmp_path):
    options = (
        "--preset grpo --policy-loss.clip-ratio-high 0.3 --steps 1 --model.config.num-experts 2 --cold-start.steps 0"
    )
    main(["train", str(config_file()), *options.split()])
    config = load_config(tmp_path / "run" / "config.toml")
    assert config.policy_loss.objective == "minirl"  # the file gives every field, which overrides the preset
    assert config.policy_loss.clip_ratio_high == 0.3
    assert config.steps == 1
    assert config.model.config["num_experts"] == 2
    assert [line["phase"] for line in metrics_of(tmp_path / "run")] == ["train", "train"]


def test_jsonl_task_on_a_trained_model(trained, config_file, tmp_path):
    problems = tmp_path / "problems.jsonl"
    problems.write_text("\n".join(f'{{"prompt": "{n}+1=", "answer": "{n + 1}"}}' for n in range(40)))
    task = TaskConfig(kind="jsonl", path=str(problems))
    model = ModelConfig(path=str(trained[0] / "model"))
    path = config_file(task=task, model=model, run_dir=str(tmp_path / "second"), cold_start=ColdStartConfig())
    main(["train", str(path)])
    assert metrics_of(tmp_path / "second")[-1]["step"] == 2


def test_folders_that_a_run_must_not_touch(trained, config_file, capsys, tmp_path):
    run, path = trained[0], config_file()
    assert "is not empty: it must be a new folder, or pass --overwrite" in fails(capsys, "train", path)
    assert len(metrics_of(run)) == 5

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("")
    said = fails(capsys, "train", path, "--run-dir", foreign, "--overwrite")
    assert "holds no config.toml: --overwrite replaces only a run" in said
    assert (foreign / "thesis.tex").exists()

    said = fails(capsys, "train", path, "--run-dir", path / "run")
    assert "cannot be written to: Not a directory" in said


def test_overwrite(trained, config_file):
    main(["train", str(config_file()), "--overwrite", "--steps", "1"])
    assert [line["step"] for line in metrics_of(trained[0])] == [1, 2, 0, 1]


def test_a_run_that_cannot_start_leaves_the_old_one(trained, config_file, capsys):
    path = config_file(model=ModelConfig(config={"model_type": "qwen4_moe"}))
    said = fails(capsys, "train", path, "--overwrite")
    assert "model.config.model_type is 'qwen4_moe': it must be a causal language model of transformers" in said
    assert len(metrics_of(trained[0])) == 5


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"model_type": "qwen3_moe", "hidden_sise": 8},
            "unknown key model.config.hidden_sise: did you mean hidden_size?",
        ),
        ({"model_type": "qwen3_moe", "hidden_size": "8"}, "model.config: Validation error for field 'hidden_size'"),
        ({"model_type": "qwen3_moe", "vocab_size": 8}, "model.config.vocab_size is 8: it must be left out"),
        ({"hidden_size": 8}, "model.config.model_type is None"),
    ],
)
def test_models_that_cannot_be_built(config_file, capsys, model, message):
    assert message in fails(capsys, "train", config_file(model=ModelConfig(config=model)))


def test_what_the_command_line_must_not_say(config_file, capsys, tmp_path):
    path = config_file()
    assert "cannot read the config file" in fails(capsys, "train", tmp_path / "nowhere.toml")
    assert "--optimizer.learning-rate" in fails(capsys, "train", path, "--optimizer.learning-rate", "1")
    assert "--steps" in fails(capsys, "train", path, "--steps", "many")
    assert "steps is 0: it must be at least 1" in fails(capsys, "train", path, "--steps", "0")
    assert "it must come after it" in fails(capsys, "train", "--steps", "1", path)
    assert "clip_ratio_low is 4.0: it must be in [0, 1]" in fails(
        capsys, "train", path, "--policy-loss.clip-ratio-low", 4
    )
    assert "is not the folder of a run" in fails(capsys, "eval", tmp_path)
    assert "is not the folder of a run" in fails(capsys, "plot", tmp_path)
    assert "RUN_DIR is missing" in fails(capsys, "plot")
    assert not (tmp_path / "run").exists()


def test_eval_refuses_nonsense(trained, capsys):
    run = trained[0]
    assert "--k is 0: it must be at least 1" in fails(capsys, "eval", run, "--k", "0")
    (run / "model" / "config.json").unlink()
    assert "cannot load a model from" in fails(capsys, "eval", run)


def test_cuda_that_is_not_there(config_file, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "device is 'cuda', and torch finds no GPU" in fails(capsys, "train", config_file(), "--device", "cuda")


def test_help(capsys):
    for arguments, expected in (
        (["--help"], "train"),
        (["train", "--help"], "Updates per global step, N in the paper"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 0
        assert expected in " ".join(capsys.readouterr().out.replace("│", " ").split())


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.name)
def test_examples_are_valid(path):
    load_config(path).check()
    assert replace(load_config(path)).run_dir.startswith("runs/")
