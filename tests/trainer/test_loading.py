"""A checkpoint is used completely or refused with one message; missing weights are never random."""

import json
import shutil

import pytest
import torch
from command import fails
from minirl import loading
from minirl.errors import MiniRLError
from minirl.loading import find_model, load_model
from safetensors.torch import load_file, save_file
from tiny_run import TINY_MODEL
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPTJConfig, Qwen3MoeConfig

QUERY = "model.layers.0.self_attn.q_proj.weight"
EXPERT = "model.layers.1.mlp.experts.3.down_proj.weight"


@pytest.fixture
def folder(finished_run, tmp_path):
    """The folder of a model, which the test damages."""
    return shutil.copytree(finished_run / "model", tmp_path / "model")


@pytest.fixture
def change_weights(folder):
    """Applies a function to the dict of tensors in the folder's file."""

    def change(function) -> str:
        tensors = load_file(folder / "model.safetensors")
        function(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return str(folder)

    return change


def change_json(path, **keys) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(QUERY), f"lacks {QUERY}: it must have the model's weights"),
        (lambda tensors: tensors.pop("lm_head.weight"), "lacks lm_head.weight"),
        (lambda tensors: tensors.pop(EXPERT), "has model.layers.1.mlp.experts.down_proj [3, 32, 16] instead of"),
        (
            lambda tensors: [tensors.pop(name) for name in list(tensors) if ".layers.1." in name],
            "lacks model.layers.1.input_layernorm.weight, model.layers.1.mlp.experts.down_proj, "
            "model.layers.1.mlp.experts.gate_up_proj and 8 more",
        ),
        (
            lambda tensors: tensors.update({"score.weight": torch.ones(3)}),
            "has, and its model has not, score.weight: it must have the model's weights, and no others",
        ),
        (lambda tensors: tensors.update({QUERY: torch.ones(3, 32)}), f"has {QUERY} [3, 32] instead of [32, 32]"),
        (
            lambda tensors: tensors.update({EXPERT: torch.ones(5)}),
            "model.layers.1.mlp.experts.down_proj cannot be made from the weights in the file",
        ),
        (lambda tensors: tensors[QUERY][3, 4].fill_(torch.nan), f"{QUERY} of"),
        (lambda tensors: tensors[QUERY][3, 4].fill_(torch.inf), "is not finite: weights must be numbers"),
    ],
)
def test_weights_that_are_not_the_models(change_weights, capfd, change, message):
    path = change_weights(change)
    with pytest.raises(MiniRLError) as error:
        load_model(path)
    assert message in str(error.value)
    assert "LOAD REPORT" not in capfd.readouterr().err


def test_a_checkpoint_that_lacks_a_tensor_is_used_by_no_command(run_folder, config_file, tmp_path, capsys):
    file = run_folder / "model" / "model.safetensors"
    tensors = load_file(file)
    del tensors[QUERY]
    save_file(tensors, file, {"format": "pt"})
    message = f"{run_folder / 'model'} lacks {QUERY}"
    assert message in fails(capsys, "eval", run_folder)
    assert message in fails(capsys, "discrepancy", run_folder)
    assert message in fails(capsys, "discrepancy", run_folder / "model")
    train = ("train", config_file(), "--run-dir", tmp_path / "next", "--model.path", run_folder / "model")
    assert message in fails(capsys, *train)
    assert not (tmp_path / "next" / "config.toml").exists()


def split(folder) -> None:
    """Splits the weights into two files and deletes one."""
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": {QUERY: "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: cut(folder / "model.safetensors", 5000), "incomplete metadata, file not fully covered"),
        (lambda folder: cut(folder / "model.safetensors", 0), "header too small"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
        (split, "No such file or directory: "),
        (lambda folder: cut(folder / "config.json", 10), "is not a valid JSON file"),
        (lambda folder: (folder / "config.json").unlink(), "it must hold config.json"),
        (lambda folder: cut(folder / "tokenizer.json", 10), "cannot load a tokenizer from"),
        (lambda folder: cut(folder / "tokenizer_config.json", 0), "cannot load a tokenizer from"),
        (lambda folder: cut(folder / "generation_config.json", 10), "is not a valid JSON file"),
        (lambda folder: change_json(folder / "config.json", vocab_size=30), "[15, 32] instead of [30, 32]"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "holds a LoRA adapter"),
    ],
)
def test_files_that_are_damaged(folder, damage, message):
    damage(folder)
    with pytest.raises(MiniRLError) as error:
        load_model(str(folder))
    assert message in str(error.value)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_model_that_cannot_compute(run_folder, config_file, tmp_path, capsys):
    change_json(run_folder / "model" / "config.json", num_experts_per_tok=20)
    message = f"{run_folder / 'model'} makes no Qwen3MoeForCausalLM that computes: selected index k out of range"
    assert message in fails(capsys, "eval", run_folder)
    assert message in fails(capsys, "discrepancy", run_folder)
    train = ("train", config_file(), "--run-dir", tmp_path / "next", "--model.path", run_folder / "model")
    assert message in fails(capsys, *train)


def cut(path, length) -> None:
    path.write_bytes(path.read_bytes()[:length])


@pytest.mark.parametrize("names", [["tokenizer.json"], ["tokenizer.json", "tokenizer_config.json"]])
def test_a_folder_without_a_tokenizer(folder, names):
    """Without tokenizer files, transformers would make an empty tokenizer."""
    for name in names:
        (folder / name).unlink()
    with pytest.raises(MiniRLError, match=r"model has no tokenizer: it must hold tokenizer\.json"):
        load_model(str(folder))


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_and_buffers_that_are_not_saved_are_not_missing(finished_run, tmp_path, tied):
    tokenizer = AutoTokenizer.from_pretrained(finished_run / "model")
    gpt2 = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, tie_word_embeddings=tied)
    moe = Qwen3MoeConfig(**TINY_MODEL, vocab_size=len(tokenizer), tie_word_embeddings=tied)
    for config in (gpt2, moe):
        model = AutoModelForCausalLM.from_config(config)
        for part in (model, tokenizer):
            part.save_pretrained(tmp_path / config.model_type)
        loaded, _ = load_model(str(tmp_path / config.model_type))
        assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in model.state_dict().items())


def test_causal_masks_that_earlier_versions_saved_are_not_unexpected(finished_run, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(finished_run / "model")
    config = GPTJConfig(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, rotary_dim=8)
    for part in (AutoModelForCausalLM.from_config(config), tokenizer):
        part.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    masks = {"bias": torch.ones(1, 1, 8, 8, dtype=torch.bool).tril(), "masked_bias": torch.tensor(-1e9)}
    tensors |= {f"transformer.h.0.attn.{name}": mask for name, mask in masks.items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "runs/mathematics/modle",
            "there is no such folder, did you mean runs/mathematics/model?",
        ),
        (
            "runs/mathematic",
            "cannot load a model from runs/mathematic: there is no such folder, did you mean runs/mathematics?",
        ),
        (
            "runs/x",
            "from runs/x: there is no such folder, it must be a model's folder or a name of the hub",
        ),
        ("./Qwen3-0.6B", "cannot load a model from ./Qwen3-0.6B: there is no such folder"),
        ("elsewhere/Qwen3/model", "cannot load a model from elsewhere/Qwen3/model: there is no such folder"),
        ("Qwen3/", "cannot load a model from Qwen3/: there is no such folder"),
        ("my-modle", "cannot load a model from my-modle: there is no such folder, did you mean my-model?"),
        ("runs/mathematics", "cannot load a model from runs/mathematics: did you mean runs/mathematics/model?"),
        ("my-model/config.json", "my-model/config.json is a file: a model must be the folder that holds config.json"),
    ],
)
def test_a_mistyped_folder_is_not_looked_for_on_the_hub(tmp_path, monkeypatch, name, message):
    def connected(*_, **__):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", connected)
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/mathematics/model", "my-model"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text("{}")
    with pytest.raises(MiniRLError) as error:
        load_model(name)
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["nope", "nobody/nope"])
def test_a_name_without_a_folder_is_told_before_the_hub_is_asked(tmp_path, monkeypatch, capsys, name):
    told = []

    def unreachable(*_, **__):
        told.append(capsys.readouterr().err)
        raise OSError("no network")

    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", unreachable)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MiniRLError) as error:
        load_model(name)
    assert str(error.value) == (
        f"cannot load a model from {name}: there is no such folder here, and the hub fails: no network"
    )
    assert told == [f"minirl: {name} is not the folder of a model or a run: looking for it on the hub\n"]


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen3-0.6B"])
def test_a_hub_name_stays_one(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert find_model(name) == name
