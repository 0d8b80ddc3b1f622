"""find_target: reads the first argument of `minirl discrepancy`, a config file, a run or a model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ..config import ModelConfig, RolloutConfig, TrainConfig
from ..config_file import load_config
from ..paths import home
from ..run_dir import RunDir


@dataclass(frozen=True)
class Target:
    """A configuration with the target's model, and the folder for the report."""

    config: TrainConfig
    folder: Path
    has_task: bool


def find_target(name: str) -> Target:
    """name: a config file, the folder of a run, or the folder or hub name of a model. Raises MiniRLError."""
    path = Path(home(name, "TARGET"))
    if path.suffix == ".toml":
        config = load_config(path)
        config.check()
        return Target(config, Path(), True)
    run = RunDir(path)
    if run.config.is_file():
        config = load_config(run.ended().config)
        config.check()
        model = replace(config.model, path=str(run.model), config={})
        return Target(replace(config, model=model), path, True)
    config = TrainConfig(model=ModelConfig(path=name), rollout=RolloutConfig(max_new_tokens=64))
    return Target(config, Path(), False)
