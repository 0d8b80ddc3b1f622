"""The report of `minirl discrepancy` for models that differ by rounding only, and its files."""

import json

import pytest
import torch
from command import fails
from minirl.cli import main
from minirl.discrepancy.show import describe
from minirl.models import make_model
from position_families import COMMON, CONFIGS
from transformers import AutoModelForCausalLM, GPT2Config

from minirl_kernels.discrepancy.modules import Difference
from minirl_kernels.discrepancy.operations import OperationDifference
from minirl_kernels.discrepancy.report import FirstDifference

PROMPTS = {"single": "1+1=\n", "equal": "1+1=\n2+3=\n4+5=\n", "unequal": "1+1=\n12+3=\n"}
SHORT = ("--max-new-tokens", 6)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the command in an empty folder; returns (its JSON report, its output)."""
    monkeypatch.chdir(tmp_path)

    def call(target, *options):
        main(["discrepancy", str(target), *map(str, options)])
        return json.loads((tmp_path / "discrepancy.json").read_text()), capsys.readouterr().out

    return call


@pytest.fixture
def gpt2(tmp_path, config):
    """The folder of a model whose decoder layers are called h."""
    _, tokenizer = make_model(config)
    torch.manual_seed(0)
    sizes = {**COMMON, **CONFIGS["GPT2"], "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    AutoModelForCausalLM.from_config(GPT2Config(**sizes)).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
def test_no_difference_is_reported_where_bits_are_equal(prompts, dtype, config_file, run, tmp_path):
    (tmp_path / "prompts.txt").write_text(prompts)
    modes = ["--mu.batch-invariant", "--pi.batch-invariant", "--mu.dtype", dtype, "--pi.dtype", dtype]
    table, said = run(config_file(), "--prompts", tmp_path / "prompts.txt", *modes)
    assert table["discrepancy"]["bit_equal_fraction"] == 1.0
    assert table["modules"]["first_difference"] is None
    assert [layer["relative_difference"] for layer in table["modules"]["layers"]] == [0, 0]
    assert [layer["equal_fraction"] for layer in table["routing"]] == [1, 1]
    assert "First difference: none" in said


@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
def test_layers_of_gpt2_are_compared(prompts, gpt2, run, tmp_path):
    (tmp_path / "prompts.txt").write_text(prompts)
    table, said = run(gpt2, "--prompts", tmp_path / "prompts.txt", *SHORT)
    assert [layer["layer"] for layer in table["modules"]["layers"]] == [0, 1, 2]
    assert all(layer["relative_difference"] < 1e-5 for layer in table["modules"]["layers"])
    assert "Layer by layer" in said
    assert "same experts" not in said
    assert "No routing was compared" in said


def test_an_engine_that_ran_nothing_of_its_own_says_so(config_file, run):
    _, said = run(config_file(), "--responses", 4, "--mu.quantization", "e4m3")
    mu, pi = (line for line in said.splitlines() if line.startswith(("  μ ran", "  π ran")))
    assert "aten._to_copy.default float8_e4m3fn" in mu
    assert pi == "  π ran no operation that computes values"


def test_long_lists_of_operations_are_cut():
    names = [f"aten.op{number}.default float32" for number in range(20)]
    difference = Difference(1.0, 1.0, 1.0, 0)
    first = FirstDifference("m", "M", None, None, difference, OperationDifference(None, None, names, names[:2]), None)
    _, mu, pi = describe(first).splitlines()
    assert mu == f"  μ ran {', '.join(names[:12])} and 8 more"
    assert pi == f"  π ran {', '.join(names[:2])}"


def test_a_second_report_leaves_the_first_as_it_is(config_file, run, tmp_path):
    path = config_file()
    for seed in range(3):
        _, said = run(path, "--responses", 4, "--seed", seed)
        assert ("the earlier report is now in" in said) == (seed > 0)
    names = ["discrepancy-1", "discrepancy-2", "discrepancy"]
    tables = [json.loads((tmp_path / f"{name}.json").read_text()) for name in names]
    assert [table["seed"] for table in tables] == [0, 1, 2]
    pictures = {(tmp_path / f"{name}.png").read_bytes() for name in names}
    assert len(pictures) == 3


def test_what_is_refused_before_anything_is_sampled(gpt2, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("minirl.discrepancy.command.compare_engines", None)
    (tmp_path / "file").write_text("")

    def said(*options):
        return fails(capsys, "discrepancy", gpt2, *options)

    (tmp_path / "prompts.txt").write_text("1+1=\n")
    prompts = ("--prompts", tmp_path / "prompts.txt")
    assert (
        "--max-new-tokens is 61 and the longest prompt has 4 tokens, together 65: they must be at most 64, "
        "the context of this gpt2 model"
    ) in said(*prompts, "--max-new-tokens", 61)
    assert "file/folder cannot be written to: Not a directory" in said(*SHORT, "--output", "file/folder")
    assert f"--seed is {2**63}: it must be a number of 64 bits" in said("--seed", 2**63)


def test_a_home_folder_is_not_a_folder_called_tilde(config_file, run, tmp_path, monkeypatch):
    path = config_file()
    run(path, "--responses", 2)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run(path, "--responses", 2, "--output=~/reports")
    assert (tmp_path / "home" / "reports" / "discrepancy.json").is_file()
    assert not (tmp_path / "~").exists()
