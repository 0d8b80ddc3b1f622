"""The python blocks in docs/ run after the loss blocks, and every command in the documents exists."""

import shlex
from pathlib import Path

import pytest
from documents import DOCS, README, blocks, commands, loss_blocks
from minirl import cli
from minirl import commands as cli_commands
from minirl.config import TrainConfig
from minirl.config_file import load_config
from minirl.discrepancy.target import Target

# a line with brackets describes the usage and is not a call
COMMANDS = [line for path in [README, *DOCS] for line in commands(path, "minirl discrepancy") if "[" not in line]


@pytest.fixture(scope="module")
def losses():
    names = {}
    for block in loss_blocks():
        exec(block, names)
    return names


@pytest.mark.parametrize("path", [path for path in DOCS if blocks(path, "python")], ids=lambda path: path.name)
def test_python_blocks_run(path, losses):
    names = dict(losses)
    for block in blocks(path, "python"):
        exec(block, names)


@pytest.mark.parametrize("path", [path for path in DOCS if blocks(path, "toml")], ids=lambda path: path.name)
def test_toml_blocks_are_configurations(path, tmp_path):
    for block in blocks(path, "toml"):
        (tmp_path / "config.toml").write_text(block)
        load_config(tmp_path / "config.toml").check()


@pytest.mark.parametrize("path", [README, *DOCS], ids=lambda path: path.name)
def test_bash_blocks_are_calls_of_the_report(path):
    """The commands in unmarked bash blocks are tried below; other blocks must be marked."""
    lines = [line for block in blocks(path, "bash") for line in block.splitlines()]
    assert all(line.startswith("minirl discrepancy ") for line in lines)


@pytest.mark.parametrize("command", COMMANDS)
def test_options_of_the_report_are_known(command, monkeypatch):
    given = []
    monkeypatch.setattr(cli_commands, "find_target", lambda name: Target(TrainConfig(), Path(), False))
    monkeypatch.setattr(
        "minirl.discrepancy.command.discrepancy", lambda name, found, options, console: given.append(options) or True
    )
    cli.main(shlex.split(command)[1:])
    given[0].check()
