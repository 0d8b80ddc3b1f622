"""What rewards that teach nothing mean, told once in a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping


class RewardAdvice:
    """Looks at the metrics of each global step for rewards without any difference inside a group.

    max_new_tokens: of the responses, for the message.
    """

    def __init__(self, max_new_tokens: int):
        self._max_new_tokens = max_new_tokens
        self._told: set[str] = set()

    def after(self, step: int, metrics: Mapping[str, float]) -> Iterator[str]:
        """Lines to print after a step; each kind of line comes once in a run."""
        if metrics["groups_with_signal"] > 0:
            return
        if metrics["reward_train"] == 0:
            kind, meaning = "no reward", "no response has a reward: all are 0"
            advice = (
                "look at some responses, and whether their answers stand where the task looks for them; "
                f"{metrics['cut_off_fraction']:.0%} were cut off at rollout.max_new_tokens, {self._max_new_tokens}"
            )
        else:
            kind, meaning = "no signal", "the responses to each prompt have equal rewards"
            advice = (
                f"the mean reward is {metrics['reward_train']:.3g}; prompts that are always or never solved teach "
                "nothing, and a larger rollout.group_size or other prompts do"
            )
        if kind not in self._told:
            self._told.add(kind)
            yield (
                f"warning: step {step}: {meaning}, so that every advantage is 0 and the rewards give no gradient. "
                f"If other steps are alike, {advice}. This is said once; groups_with_signal in metrics.jsonl goes on."
            )
