"""docs/trainer.md lists every configuration key, with the default and the description in the code."""

import ast
import dataclasses
import inspect
import itertools
import json
from pathlib import Path

from minirl.config import TrainConfig

from minirl_kernels import PolicyLossConfig

PAGE = Path(__file__).resolve().parents[2] / "docs" / "trainer.md"


def words_of(cls) -> dict[str, str]:
    """{field: the string below it}."""
    body = ast.parse(inspect.getsource(cls)).body[0].body
    return {
        field.target.id: text.value.value
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


def rows(cls, prefix="") -> list[str]:
    found, words = [], words_of(cls)
    for field in dataclasses.fields(cls):
        value = getattr(cls(), field.name)
        if isinstance(value, PolicyLossConfig):
            found.append(
                f"| `{prefix}{field.name}.*` | of the preset | The fields of `minirl_kernels.PolicyLossConfig`. |"
            )
        elif dataclasses.is_dataclass(value):
            found += rows(type(value), f"{prefix}{field.name}.")
        else:
            default = json.dumps("none" if value is None else value)
            found.append(f"| `{prefix}{field.name}` | `{default}` | {words[field.name]} |")
    return found


def test_table_of_keys_is_that_of_the_code():
    table = "\n".join(["| key | default | |", "|---|---|---|", *rows(TrainConfig)])
    page = PAGE.read_text(encoding="utf-8")
    assert table in page, f"docs/trainer.md must hold this table:\n{table}"
