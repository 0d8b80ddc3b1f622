"""Reads a TrainConfig from a TOML file, and writes it back. TOML has no null, so None is the string "none"."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, Literal

import tomli_w

from minirl_kernels import PolicyLossConfig
from minirl_kernels.objectives import Objective

from .config import TrainConfig, refuse_filter
from .errors import MiniRLError
from .loss_values import is_named, own_class, table_of


def load_config(path: Path, preset: str | None = None) -> TrainConfig:
    """Read a file. A missing key has its default; in [policy_loss], the default comes from the preset.

    preset: replaces the preset in the file. Raises MiniRLError that names the file and the key.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise MiniRLError(f"cannot read the config file {path}: {getattr(error, 'strerror', None) or error}") from None
    except tomllib.TOMLDecodeError as error:
        raise MiniRLError(f"{path} is not valid TOML: {error}") from None
    if preset is not None:
        table["preset"] = preset
    try:
        return _build(TrainConfig, _with_preset(table))
    except MiniRLError as error:
        raise MiniRLError(f"{path}: {error}") from None


def dump_config(config: TrainConfig) -> str:
    """The whole configuration as TOML, from which `load_config` reads an equal configuration."""
    return tomli_w.dumps(table_of(config))


def _with_preset(table: dict[str, Any]) -> dict[str, Any]:
    """`table` with the preset's values for the missing fields of [policy_loss].

    The preset is the named one. Without a name, an objective of the user's own gives its preset.
    """
    given = table.get("policy_loss", {})
    if not isinstance(given, dict):
        return table
    preset = table.get("preset", TrainConfig.preset)
    if "preset" not in table and not is_named(given.get("objective", preset)):
        preset = convert("policy_loss.objective", given["objective"], Objective)
    try:
        fields = PolicyLossConfig.preset(preset)
    except ValueError as error:
        raise MiniRLError(str(error)) from None
    return table | {"policy_loss": table_of(fields) | given}


def _build(cls: type, table: dict[str, Any], prefix: str = "") -> Any:
    """An instance of the dataclass `cls`. Raises MiniRLError for an unknown key and for a value of the wrong type."""
    hints = typing.get_type_hints(cls)
    hints = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    values = {}
    for key, value in table.items():
        if key not in hints:
            refuse_filter(f"{prefix}{key}")
            close = difflib.get_close_matches(key, hints, n=1)
            guess = f"did you mean {prefix}{close[0]}? " if close else ""
            raise MiniRLError(f"unknown key {prefix}{key}: {guess}it must be one of {', '.join(hints)}")
        values[key] = convert(f"{prefix}{key}", value, hints[key])
    try:
        return cls(**values)
    except (ValueError, TypeError) as error:
        raise MiniRLError(f"{prefix}{error}") from None


def convert(key: str, value: Any, hint: Any) -> Any:
    """`value` as the type `hint`. Accepts an integer for a float, a list for a tuple, and "none" for None."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    options = typing.get_args(hint) if is_union else (hint,)
    if type(None) in options and value == "none":
        return None
    if Objective in options and not is_named(value):
        fields = dict(value) if isinstance(value, dict) else {"class": value}
        return _build(own_class(fields.pop("class", None), key), fields, f"{key}.")
    expected = options[0]
    if isinstance(value, dict):
        expected = next((option for option in options if dataclasses.is_dataclass(option)), expected)
    origin, arguments = typing.get_origin(expected) or expected, typing.get_args(expected)
    if dataclasses.is_dataclass(expected) and isinstance(value, dict):
        return _build(expected, value, f"{key}.")
    if origin is Literal and value in arguments:
        return value
    if origin is tuple and isinstance(value, list) and len(value) == len(arguments):
        return tuple(convert(key, item, argument) for item, argument in zip(value, arguments, strict=True))
    if origin is float and type(value) is int:
        return float(value)
    if type(value) is origin:
        return value
    raise MiniRLError(f"{key} is {value!r}: it must be {' or '.join(_describe(option, key) for option in options)}")


def _describe(hint: Any, key: str) -> str:
    origin, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if dataclasses.is_dataclass(origin):
        return f"a table, [{key}]"
    if origin is Literal:
        return "one of " + ", ".join(repr(argument) for argument in arguments)
    if origin is tuple:
        return f"a list of {len(arguments)} numbers"
    return {
        int: "an integer",
        float: "a number",
        bool: "true or false",
        str: "a string",
        dict: "a table",
        type(None): '"none"',
    }[origin]
