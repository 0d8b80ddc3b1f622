"""For every way to end a run, the weights of finished updates are kept and the terminal shows one message."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from command import fails
from minirl import run as run_module
from minirl.cli import main
from minirl.train import Trainer
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

KEPT = "model has the weights that the last finished update made"


@pytest.fixture
def ends_in_step_2(monkeypatch):
    """Replaces the second step by another function; returns the weights after the first step."""
    weights = {}
    step = Trainer.step

    def patch(end):
        def patched(trainer, number):
            if number == 1:
                metrics = step(trainer, number)
                weights.update({name: value.clone() for name, value in trainer.model.state_dict().items()})
                return metrics
            return end()

        monkeypatch.setattr(Trainer, "step", patched)
        return weights

    return patch


def assert_kept(folder: Path, weights: dict, steps=(1, 2, 0, 1)) -> None:
    saved = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    assert weights
    assert all(torch.equal(saved[name], value) for name, value in weights.items())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert tuple(line["step"] for line in lines) == steps


def raises(error):
    def end():
        raise error

    return end


def stopped(capsys, *arguments) -> tuple[int, str]:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return end.value.code, capsys.readouterr().err


def test_an_error_that_nobody_expected_keeps_the_finished_steps(config_file, tmp_path, ends_in_step_2):
    weights = ends_in_step_2(raises(RuntimeError("index out of range in self")))
    with pytest.raises(RuntimeError, match="index out of range") as error:
        main(["train", str(config_file())])
    assert f"{tmp_path / 'run' / KEPT}" in error.value.__notes__
    assert_kept(tmp_path / "run", weights)


def test_a_full_disk_in_a_step_keeps_the_finished_steps(config_file, tmp_path, capsys, ends_in_step_2):
    weights = ends_in_step_2(raises(OSError(28, "No space left on device", "metrics.jsonl")))
    said = fails(capsys, "train", config_file())
    assert said.startswith("minirl: [Errno 28] No space left on device: 'metrics.jsonl'; ")
    assert KEPT in said
    assert_kept(tmp_path / "run", weights)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_keep_the_finished_steps(config_file, tmp_path, capsys, ends_in_step_2, number, status):
    before = signal.getsignal(number)
    weights = ends_in_step_2(lambda: os.kill(os.getpid(), number))
    assert stopped(capsys, "train", config_file()) == (status, f"minirl: stopped; {tmp_path / 'run' / KEPT}\n")
    assert_kept(tmp_path / "run", weights)
    assert not (tmp_path / "run" / ".minirl.lock").exists()
    assert signal.getsignal(number) == before


def full(*arguments, **options):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_a_full_disk_at_the_last_save_loses_no_weights(config_file, tmp_path, capsys, monkeypatch):
    """The weights are saved in the folder for temporary files, which may be on another disk."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    write = run_module._write
    monkeypatch.setattr(
        run_module, "_write", lambda folder, *rest: (full if "run" in folder.parts else write)(folder, *rest)
    )
    said = fails(capsys, "train", config_file())
    assert (
        f"minirl: {tmp_path / 'run' / 'model'} cannot be written to (Error while serializing: I/O error: No space"
        in said
    )
    (folder,) = (tmp_path / "temporary").iterdir()
    assert said.endswith(f"{folder / 'model'} has the weights")
    AutoModelForCausalLM.from_pretrained(folder / "model")


def test_full_disks_everywhere(config_file, tmp_path, capsys, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(run_module, "_write", full)
    said = fails(capsys, "train", config_file())
    assert f"the weights are lost: {tmp_path / 'run' / 'model'} cannot be written to" in said
    assert not list((tmp_path / "temporary").iterdir())


def test_a_file_that_may_not_grow_leaves_the_model_of_before(finished_run, tmp_path):
    """The kernel refuses to write in the middle of the weights file; the earlier model must survive."""
    code = """if True:
        import resource, signal, sys
        from pathlib import Path
        from minirl.loading import load_model
        from minirl.run import save
        from minirl.run_dir import RunDir
        run = RunDir(Path(sys.argv[1]))
        model = load_model(sys.argv[2])
        save(run, *model)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        save(run, *model)
    """
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    arguments = [sys.executable, "-c", code, str(tmp_path), str(finished_run / "model")]
    result = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert f"MiniRLError: the weights are lost: {tmp_path / 'model'} cannot be written to" in result.stderr
    assert "File too large" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def test_a_disk_without_room_for_the_weights_is_told_before_any_work(config_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=1))
    said = fails(capsys, "train", config_file())
    assert f"the disk of run_dir {tmp_path / 'run'} has 1 byte free: it must have 79.5 kB, for the weights" in said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


class StopsImport:
    """Raises KeyboardInterrupt while a module is imported."""

    def find_spec(self, name, *_):
        if name == "minirl.commands":
            raise KeyboardInterrupt


def test_ctrl_c_while_torch_is_imported(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "minirl.commands", raising=False)
    monkeypatch.setattr(sys, "meta_path", [StopsImport(), *sys.meta_path])
    assert stopped(capsys, "train", "config.toml") == (130, "minirl: stopped\n")


def test_the_command_imports_nothing_slow_before_it_can_be_stopped():
    code = "import minirl.cli, sys; print(*{'torch', 'tyro', 'numpy', 'rich'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "\n"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_a_pipe_that_nobody_reads(arguments):
    """`minirl --help | head` closes the pipe early."""
    process = subprocess.Popen(
        [sys.executable, "-m", "minirl", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141
