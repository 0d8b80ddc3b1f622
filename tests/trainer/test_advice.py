"""A step whose rewards give no gradient causes one warning, with advice."""

import pytest
from minirl.advice import RewardAdvice
from minirl.cli import main
from minirl.tasks import ArithmeticTask

UNSOLVED = {"groups_with_signal": 0.0, "reward_train": 0.0, "cut_off_fraction": 0.5}
SOLVED = {"groups_with_signal": 0.0, "reward_train": 1.0, "cut_off_fraction": 0.0}
SOME = {"groups_with_signal": 0.25, "reward_train": 0.1, "cut_off_fraction": 0.0}


def test_each_kind_is_told_once():
    advice = RewardAdvice(256)
    steps = [SOME, UNSOLVED, UNSOLVED, SOLVED, SOLVED, UNSOLVED]
    told = [list(advice.after(step, metrics)) for step, metrics in enumerate(steps, 1)]
    assert [len(lines) for lines in told] == [0, 1, 0, 1, 0, 0]
    assert "step 2: no response has a reward: all are 0" in told[1][0]
    assert "50% were cut off at rollout.max_new_tokens, 256" in told[1][0]
    assert "step 4: the responses to each prompt have equal rewards" in told[3][0]
    assert "the mean reward is 1;" in told[3][0]


@pytest.mark.parametrize(
    ("reward", "expected"),
    [(0.0, "no response has a reward"), (1.0, "the responses to each prompt have equal rewards"), (None, None)],
)
def test_training_says_so_once(config_file, capsys, monkeypatch, reward, expected):
    def graded(self, problem, response):
        return float(len(response) % 2) if reward is None else reward

    monkeypatch.setattr(ArithmeticTask, "reward", graded)
    main(["train", str(config_file())])
    said = capsys.readouterr().out
    assert said.count("warning: step 1:") == (expected is not None)
    assert "warning: step 2:" not in said
    assert expected is None or expected in said
