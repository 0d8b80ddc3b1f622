"""`minirl train` with vLLM's rollouts."""

from dataclasses import replace
from pathlib import Path

from minirl.config import EvalConfig
from minirl.config_file import load_config

EXAMPLE = Path(__file__).parents[2] / "examples" / "arithmetic.toml"


def test_the_example_learns(train):
    config = replace(load_config(EXAMPLE), steps=16, eval=EvalConfig(every=16))
    before, *steps = train(config)
    assert steps[-1]["reward_held_out"] > before["reward_held_out"] + 0.1
    assert all(0 < step["log_d_abs_max"] < 1e-4 for step in steps)  # two engines, in float32
