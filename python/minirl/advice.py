"""RewardAdvice: warns once in a run if the rewards of a step give no gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping


class RewardAdvice:
    """Checks the metrics of each global step for groups whose responses all have equal rewards.

    max_new_tokens: the limit of response length, for the message.
    """

    def __init__(self, max_new_tokens: int):
        self._max_new_tokens = max_new_tokens
        self._given: set[str] = set()

    def after(self, step: int, metrics: Mapping[str, float]) -> Iterator[str]:
        """Warnings to print after a step. Each kind of warning is given once in a run."""
        if metrics["groups_with_signal"] > 0:
            return
        if metrics["reward_train"] == 0:
            kind, meaning = "no reward", "no response has a reward: all are 0"
            advice = (
                "look at some responses, and check that the task finds their answers; "
                f"{metrics['cut_off_fraction']:.0%} were cut off at rollout.max_new_tokens, {self._max_new_tokens}"
            )
        else:
            kind, meaning = "no signal", "the responses to each prompt have equal rewards"
            advice = (
                f"the mean reward is {metrics['reward_train']:.3g}; prompts that are always or never solved give no "
                "gradient: use a larger rollout.group_size or other prompts"
            )
        if kind not in self._given:
            self._given.add(kind)
            yield (
                f"warning: step {step}: {meaning}, so that every advantage is 0 and the rewards give no gradient. "
                f"If this happens in many steps: {advice}. This warning is given once; see groups_with_signal in "
                "metrics.jsonl."
            )
