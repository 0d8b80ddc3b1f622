"""Cases of the kernels that choose the rows of fused_linear_policy_loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from verify.case import Case

from minirl_kernels.ops.fused_linear_policy_loss import triton
from minirl_kernels.ops.fused_linear_policy_loss.tiles import ChosenRows
from minirl_kernels.ops.fused_policy_loss.loss_rows import LossRows
from minirl_kernels.ops.linear_token_logprobs.head import HeadRows

ROWS = 2500


class Operands(NamedTuple):
    head: HeadRows
    loss: LossRows

    @classmethod
    def make(cls, rows: int, entropy_coef: float, *, traps: bool = False) -> Operands:
        """Traps: ignored rows and an id out of range. Every fourth row has no advantage."""
        ids = torch.arange(rows) % 17
        if traps:
            ids[::3], ids[1] = -100, 99
        ones, advantages = torch.ones(rows), (torch.arange(rows) % 4).float()
        head = HeadRows(torch.ones(rows, 8), torch.ones(17, 8), None, ids, ones, 0.0, None, None)
        per_row = (-ones, -2 * ones, None, advantages, ones)
        return cls(head, LossRows(*per_row, "minirl", True, 0.8, 1.2, 5.0, 0.0, "k3", entropy_coef))


def _count(operands: Operands) -> tuple[Tensor, ...]:
    return (triton.count_rows(*operands),)


def _select(operands: Operands) -> tuple[Tensor, ...]:
    """All rows are chosen, so that every element of the results is written."""
    ids, advantages = operands.head.token_ids, operands.loss.advantages
    in_loss = ids != -100
    has_gradient = in_loss & ((advantages != 0) | (ids >= 17) | (operands.loss.entropy_coef != 0))
    kinds = torch.stack([has_gradient, in_loss & ~has_gradient], 1).long()
    tile = triton.BLOCK.tile
    counts = torch.stack([rows.sum(0) for rows in kinds.split(tile)])
    index, place, is_valid, head, loss = triton.select_rows(*operands, counts, len(ids))
    tensors = (value for value in (head.token_ids, head.temperature, *loss) if isinstance(value, Tensor))
    return index, place, is_valid.view(1), *tensors


def _spread(operands: Operands) -> tuple[Tensor, ...]:
    rows = len(operands.head.token_ids)
    chosen = ChosenRows(slice(None), rows, *operands, place=torch.arange(rows) - 100)
    return tuple(triton.spread([operands.loss.weights] * 4, chosen, rows))


# kernel: bytes that it loads of each row
KERNELS: dict[str, tuple[Callable[..., Any], int]] = {
    "fused_linear_policy_loss_count_rows": (_count, 12),
    "fused_linear_policy_loss_select_rows": (_select, 48),
    "fused_linear_policy_loss_spread_rows": (_spread, 24),
}


def _case(name: str, branch: str = "", entropy_coef: float = 0.0) -> Case:
    launch, of_row = KERNELS[name]
    return Case(
        name=f"{name}: {branch}" if branch else name,
        dtype=torch.float32,
        size=f"{ROWS:,}",
        sizes=f"{ROWS:,} rows",
        operands=partial(Operands.make, ROWS, entropy_coef),
        launch=launch,
        config=lambda: triton.BLOCK,
        most_loaded=lambda programs: of_row * ROWS + programs * programs * 64,
        unit="rows",
        unit_bytes=ROWS * of_row,
    )


def interpreter_cases() -> Iterator[Case]:
    yield from map(_case, KERNELS)


def compile_cases() -> Iterator[Case]:
    yield from map(_case, KERNELS)
    for name in list(KERNELS)[:2]:
        yield _case(name, "with a bonus", entropy_coef=0.1)
