"""Very small runs, and their trainers."""

import shutil
from dataclasses import replace

import pytest
from minirl.config_file import dump_config
from minirl.models import make_model
from minirl.run import train
from minirl.sampling import make_sampler
from minirl.tasks import make_task
from minirl.train import Trainer
from rich.console import Console
from tiny_run import tiny_run


@pytest.fixture
def config(tmp_path):
    return tiny_run(tmp_path / "run")


@pytest.fixture
def make_trainer():
    """Makes a trainer whose task rewards responses of odd length, since an untrained model cannot add."""

    def make(config, **changes) -> Trainer:
        config = replace(config, **changes)
        model, tokenizer = make_model(config)
        sampler = make_sampler(config, model, tokenizer, make_task(config.task))
        sampler.task.reward = lambda problem, response: float(len(response) % 2)
        return Trainer(config, model, sampler)

    return make


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """The folder of a finished run. Tests must not change it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(tiny_run(folder), Console(quiet=True))
    return folder


@pytest.fixture
def run_folder(finished_run, tmp_path):
    """A copy of the finished run's folder."""
    return shutil.copytree(finished_run, tmp_path / "run")


@pytest.fixture
def config_file(tmp_path, config):
    """Writes the configuration with some changes, and returns the path of the file."""

    def write(**changes):
        path = tmp_path / "config.toml"
        path.write_text(dump_config(replace(config, **changes)))
        return path

    return write
