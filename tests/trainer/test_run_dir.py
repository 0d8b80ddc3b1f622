"""The folder of a run, and pictures: only files that a run has written are removed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command import fails
from minirl.cli import main
from minirl.config import TrainConfig
from minirl.errors import MiniRLError
from minirl.paths import home
from minirl.run_dir import RunDir, replacing, replacing_folder


@pytest.fixture
def thesis(tmp_path):
    """Makes a folder of the user, and returns the single file in it."""

    def make(name) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "thesis.tex").write_text("years of work")
        return folder / "thesis.tex"

    return make


def half_write(path):
    path.write_text("half of the new")
    raise OSError("disk full")


@pytest.mark.parametrize("name", ["figures", "figures.png"])
def test_plot_into_the_name_of_a_folder_leaves_the_folder(finished_run, thesis, capsys, name):
    file = thesis(name)
    said = fails(capsys, "plot", finished_run, "--output", file.parent)
    assert "--output is" in said or "is a folder: it must be the name of a file" in said
    assert file.read_text() == "years of work"


@pytest.mark.parametrize("name", ["curves", "curves.txt", "curves.png.bak"])
def test_plot_into_a_name_that_is_no_pictures(tmp_path, capsys, name):
    said = fails(capsys, "plot", tmp_path / "nowhere", "--output", name)
    assert f"--output is {name}: it must be the name of a picture, ending in .png, .pdf, .svg" in said


def test_plot_into_other_pictures(finished_run, tmp_path):
    main(["plot", str(finished_run), "--output", str(tmp_path / "curves.svg")])
    assert "<svg" in (tmp_path / "curves.svg").read_text()


def test_a_link_to_a_picture_stays_a_link(finished_run, tmp_path):
    (tmp_path / "here.png").symlink_to(tmp_path / "there.png")
    main(["plot", str(finished_run), "--output", str(tmp_path / "here.png")])
    assert (tmp_path / "here.png").is_symlink()
    assert (tmp_path / "there.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_that_cannot_be_made_leaves_the_old_one(tmp_path):
    path = tmp_path / "numbers.json"
    path.write_text("old")
    with pytest.raises(OSError, match="disk full"), replacing(path) as temporary:
        half_write(temporary)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_overwrite_leaves_other_files_of_the_folder(run_folder, config_file):
    names = ("notes.md", "model-of-before/weights", "figures/loss.png", "discrepancy-2026-notes.json")
    others = [run_folder / name for name in names]
    for path in others:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    main(["train", str(config_file()), "--overwrite", "--steps", "1", "--cold-start.steps", "0"])
    assert [path.read_text() for path in others] == ["mine"] * 4
    assert len((run_folder / "metrics.jsonl").read_text().splitlines()) == 2
    assert len(list((run_folder / "tensorboard").iterdir())) == 1  # the events of the run before are gone


def test_overwrite_removes_every_report_of_the_run_before(run_folder, config_file):
    names = ["discrepancy.json", "discrepancy.png", "discrepancy-1.json", "discrepancy-12.png"]
    for name in names:
        (run_folder / name).write_text("of the run before")
    main(["train", str(config_file()), "--overwrite", "--steps", "1", "--cold-start.steps", "0"])
    assert not [name for name in names if (run_folder / name).exists()]


@pytest.mark.parametrize("name", ["model/notes.md", "model/adapters/weights", "tensorboard/notes.md"])
def test_overwrite_refuses_to_remove_foreign_files(run_folder, config_file, capsys, name):
    path = run_folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    before = (run_folder / "metrics.jsonl").read_text()
    said = fails(capsys, "train", config_file(), "--overwrite")
    folder, inner = name.split("/")[:2]
    assert f"{run_folder / folder} holds {inner}, which no run has written: it must be moved away" in said
    assert path.read_text() == "mine"
    assert (run_folder / "metrics.jsonl").read_text() == before


def test_overwrite_refuses_a_model_that_no_run_has_written(run_folder, config_file, capsys):
    (run_folder / "model" / ".minirl").unlink()
    assert "which no run has written" in fails(capsys, "train", config_file(), "--overwrite")
    assert (run_folder / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["model", "tensorboard"])
def test_overwrite_refuses_links_and_files_for_its_folders(run_folder, config_file, thesis, capsys, name):
    file = thesis("elsewhere")
    for make in (lambda path: path.symlink_to(file.parent), lambda path: path.write_text("mine")):
        (run_folder / name).rename(run_folder / f"{name}-before")
        make(run_folder / name)
        assert f"{run_folder / name} is no folder: it must be moved away" in fails(
            capsys, "train", config_file(), "--overwrite"
        )
        (run_folder / name).unlink()
        (run_folder / f"{name}-before").rename(run_folder / name)
    assert file.is_file()


def test_overwrite_refuses_folders_for_its_files(run_folder, config_file, capsys):
    (run_folder / "curves.png").unlink()
    (run_folder / "curves.png").mkdir()
    assert "curves.png is a folder: it must be moved away" in fails(capsys, "train", config_file(), "--overwrite")


@pytest.mark.parametrize("content", ["# my own notes\n[server]\nport = 3\n", "="])
def test_overwrite_refuses_a_config_that_is_not_a_runs(run_folder, config_file, capsys, content):
    (run_folder / "config.toml").write_text(content)
    said = fails(capsys, "train", config_file(), "--overwrite")
    assert f"run_dir {run_folder} holds no run for --overwrite to replace" in said
    assert (run_folder / "config.toml").read_text() == content


def test_overwrite_refuses_a_folder_with_a_config_and_no_run(config_file, tmp_path, capsys):
    """The config may be the user's own file, with comments."""
    path = config_file()
    said = fails(capsys, "train", path, "--run-dir", tmp_path, "--overwrite")
    assert f"run_dir {tmp_path} holds no metrics.jsonl: --overwrite replaces only a run" in said
    assert path.is_file()


def test_a_run_behind_a_link(config_file, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    for options in ([], ["--overwrite"]):
        main(["train", str(config_file()), "--run-dir", str(tmp_path / "link"), "--steps", "1", *options])
    assert (tmp_path / "disk" / "model" / "model.safetensors").is_file()
    assert (tmp_path / "link").is_symlink()


def test_a_folder_that_cannot_be_made_leaves_the_old_one(tmp_path):
    folder = tmp_path / "model"
    with replacing_folder(folder) as path:
        (path / "weights").write_text("old")
    with pytest.raises(OSError, match="disk full"), replacing_folder(folder) as path:
        half_write(path / "weights")
    assert (folder / "weights").read_text() == "old"
    assert list(tmp_path.iterdir()) == [folder]
    with replacing_folder(folder) as path:
        (path / "shard").write_text("new")
    assert {path.name for path in folder.iterdir()} == {".minirl", "shard"}


def test_two_runs_into_one_folder(config_file, tmp_path, capsys):
    path = config_file()
    with RunDir(tmp_path / "run").held(overwrite=False):
        for options in ([], ["--overwrite"]):
            said = fails(capsys, "train", path, *options)
            assert f"run_dir {tmp_path / 'run'} belongs to a run that has not ended" in said
    main(["train", str(path), "--steps", "1"])


def test_a_killed_run_does_not_keep_its_folder(tmp_path):
    code = """if True:
        import os, signal, sys
        from pathlib import Path
        from minirl.run_dir import RunDir
        with RunDir(Path(sys.argv[1])).held(overwrite=False):
            os.kill(os.getpid(), signal.SIGKILL)
    """
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")]).returncode == -9
    assert os.listdir(tmp_path / "run") == [".minirl.lock"]
    with RunDir(tmp_path / "run").held(overwrite=False):
        pass
    assert os.listdir(tmp_path / "run") == []


def test_tilde_is_the_home_folder(config_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    main(["train", str(config_file(run_dir="~/from-file")), "--steps", "1"])
    main(["train", str(config_file()), "--steps", "1", "--run-dir", "~/run", "--model.path", "~/from-file/model"])
    main(["eval", "~/run", "--k", "1", "--prompts", "2"])
    main(["plot", "~/run", "--output", "~/figures/curves.png"])
    main(["discrepancy", "~/run", "--responses", "2", "--max-new-tokens", "2", "--output", "~/report"])
    assert {path.name for path in (tmp_path / "home").iterdir()} == {"from-file", "run", "figures", "report"}
    assert not (tmp_path / "~").exists()
    said = fails(capsys, "train", config_file(), "--run-dir", "~nobody-of-this-name/run")
    assert "run_dir is '~nobody-of-this-name/run': it must be a path" in said


def test_an_empty_path_is_not_this_folder():
    with pytest.raises(MiniRLError, match="run_dir is ''"):
        TrainConfig(run_dir="")
    assert home("a/~b", "name") == "a/~b"
