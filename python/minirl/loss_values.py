"""The values of [policy_loss] that are objects, as text and as tables: an objective, and a correction by d.

objective is a name, "package.module:Class" of a class of one's own, or a table: its `class` and its fields.
rollout_is is a level, or a table of the fields of minirl_kernels.Correction. An option of the command line takes such a
table as TOML writes it in one line: '{class = "package.module:Class", scale = 2.0}'.
"""

from __future__ import annotations

import dataclasses
import importlib
import operator
import tomllib
import typing
from typing import Any

import tomli_w
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from minirl_kernels import Correction
from minirl_kernels.objectives import NAMED, Objective

from .errors import MiniRLError


def is_named(objective: Any) -> bool:
    """Whether it is the name of an objective of the library."""
    return isinstance(objective, str) and objective in NAMED


def own_class(path: Any, key: str) -> type[Objective]:
    """The class that "package.module:Class" names. Raises MiniRLError with the path."""
    module, _, name = path.partition(":") if isinstance(path, str) else ("", "", "")
    if not module or not name:
        names = ", ".join(repr(name) for name in NAMED)
        raise MiniRLError(f"{key} is {path!r}: it must be one of {names}, or package.module:Class")
    try:
        found = operator.attrgetter(name)(importlib.import_module(module))
    except (ImportError, AttributeError, ValueError) as error:
        raise MiniRLError(
            f"{key} is {path!r}, which does not import ({error}): it must be package.module:Class, and PYTHONPATH must "
            "have the folder of the package where it is not installed"
        ) from None
    if not (isinstance(found, type) and issubclass(found, Objective)):
        raise MiniRLError(f"{key} is {path!r}: it must be a class derived from minirl_kernels.objectives.Objective")
    return found


def table_of(value: Any) -> Any:
    """A dataclass as a table of its fields, an objective with its class, None as "none"; other values as they are."""
    if isinstance(value, dict):
        return {key: table_of(item) for key, item in value.items()}
    if not dataclasses.is_dataclass(value):
        return "none" if value is None else value
    table = {field.name: table_of(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Objective):
        return {"class": f"{type(value).__module__}:{type(value).__qualname__}", **table}
    return table


def options_of_values(convert: typing.Callable[[str, Any, Any], Any]) -> ConstructorRegistry:
    """What tyro needs for the two: one option each. convert: (key, value as in TOML, type) -> value."""
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        kinds = typing.get_args(info.type)
        if Objective not in kinds and Correction not in kinds:
            return None
        metavar = "{NAME|MODULE:CLASS|TABLE}" if Objective in kinds else "{token|sequence|none|TABLE}"
        key = "policy_loss.objective" if Objective in kinds else "policy_loss.rollout_is"

        def from_text(texts: list[str]) -> Any:
            try:
                return convert(key, _from_line(texts[0]), info.type)
            except MiniRLError as error:
                raise ValueError(str(error)) from None

        return PrimitiveConstructorSpec(
            nargs=1,
            metavar=metavar,
            instance_from_str=from_text,
            is_instance=lambda value: True,
            str_from_instance=lambda value: [_in_a_line(table_of(value))],
        )

    return registry


def _from_line(text: str) -> Any:
    if not text.startswith("{"):
        return "none" if text == "None" else text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError as error:
        raise MiniRLError(f"{text} is not a TOML table in one line: {error}") from None


def _in_a_line(value: Any) -> str:
    if not isinstance(value, dict):
        return value
    return "{" + ", ".join(tomli_w.dumps(value).strip().splitlines()) + "}"
