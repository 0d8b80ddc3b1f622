"""Rewards: a number for a whole response, as it is, cut off or not."""

from __future__ import annotations

from math_verify import parse, verify


def exact_match(answer: str, response: str) -> float:
    """1 if the response is the answer, character by character, else 0."""
    return float(response == answer)


def parse_answer(text: str) -> list:
    """A reference answer as math-verify understands it; empty if it does not. LaTeX needs no dollar signs."""
    # without them math-verify reads plain numbers only: 3\sqrt{2} would be 3
    return parse(text if "$" in text or "\\boxed" in text else f"${text}$")


def math_equal(answer: list, response: str) -> float:
    """1 if math-verify finds the response's last answer equal to the parsed reference, else 0."""
    return float(verify(answer, parse(response)))
