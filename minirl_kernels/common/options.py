"""Checks of the fields of an option dataclass. Each message gives the field, its value and the rule for it."""

from __future__ import annotations

from collections.abc import Callable, Collection


def check_choice(name: str, value: object, choices: Collection[object]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}: it must be one of {', '.join(repr(choice) for choice in choices)}")


def check_number(name: str, value: object, must_be: str, holds: Callable[[float], bool]) -> None:
    """must_be: the rule in words. holds: whether a number obeys the rule."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}: it must be a number {must_be}")
    if not holds(value):
        raise ValueError(f"{name} is {value}: it must be {must_be}")


def check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}: it must be a bool")
