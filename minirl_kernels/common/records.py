"""Records: NamedTuples of values that pass together through an op, for its schema and its functions.

An op of torch.library takes flat arguments. `*record` spreads a record into arguments, and `unpack` rebuilds it.
"""

from __future__ import annotations

from typing import Any, TypeVar, get_type_hints

from torch import Tensor

Record = TypeVar("Record", bound=tuple)
_SCHEMA_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", str: "str", bool: "bool", float: "float"}


def schema(*records: type[Any], skip: int = 0) -> str:
    """The fields of the records as arguments of an op's schema, without the first `skip` fields."""
    fields = [field for record in records for field in get_type_hints(record).items()]
    return ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in fields[skip:])


def unpack(arguments: tuple, *records: type[Any]) -> tuple[Any, ...]:
    """(a value of each record, rebuilt from the first arguments; then the remaining arguments)."""
    values: list[Any] = []
    for record in records:
        count = len(record._fields)
        values.append(record(*arguments[:count]))
        arguments = arguments[count:]
    return *values, *arguments


def with_values(record: Record, **values: Any) -> Record:
    """The record with other values of some fields. torch.compile of torch 2.11 fails on a result of `_replace`.

    Raises TypeError for a name that is no field.
    """
    kind: Any = type(record)
    return kind(**{**dict(zip(kind._fields, record, strict=True)), **values})


def at_rows(record: Record, index: Tensor | slice) -> Record:
    """The record with every tensor indexed by `index`."""
    kind: Any = type(record)
    return kind(*(value[index] if isinstance(value, Tensor) else value for value in record))
