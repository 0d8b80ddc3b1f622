"""fused_linear_policy_loss on the GPU: the vendor's matmul, and the Triton kernel of fused_policy_loss on each tile."""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.checks import require
from ...common.records import with_values
from ...common.triton.config import LaunchConfig
from ...common.triton.launch import prepared_over_blocks
from ...common.triton.sizes import cdiv
from ..fused_policy_loss.loss_rows import LossRows
from ..fused_policy_loss.triton import forward_backward as sweep_of_tile
from ..linear_token_logprobs import triton as head
from ..linear_token_logprobs.head import HeadRows
from .kernels_rows import count_rows_kernel, select_rows_kernel, spread_rows_kernel
from .tiles import ChosenRows, all_rows, gives_every_row_a_gradient

__all__ = ["choose_rows", "head", "rows_with_gradient", "spread", "sweep_of_tile"]

BLOCK = LaunchConfig(lanes=512, vec=1, threads=256)
launch_count = prepared_over_blocks(count_rows_kernel, BLOCK.tile, BLOCK)
launch_select = prepared_over_blocks(select_rows_kernel, BLOCK.tile, BLOCK)
launch_spread = prepared_over_blocks(spread_rows_kernel, BLOCK.tile, BLOCK)


def choose_rows(head: HeadRows, loss: LossRows, max_rows: int | None) -> ChosenRows:
    """The rows that count. The host waits for their number, unless max_rows is a bound of it.

    With max_rows all chosen rows count as rows that can have a gradient: the others add exact zeros.
    """
    num_rows = len(head.token_ids)
    if max_rows is not None and max_rows >= num_rows:
        return all_rows(head, loss)
    counts = count_rows(head, loss)
    num_with_gradient = num_chosen = max_rows
    if max_rows is None:
        of_blocks = counts.tolist()
        num_with_gradient, num_others = (sum(kinds[i] for kinds in of_blocks) for i in range(2))
        num_chosen = num_with_gradient + num_others
        if num_with_gradient == num_rows:
            return all_rows(head, loss)
    index, place, is_valid, chosen_head, chosen_loss = select_rows(head, loss, counts, num_chosen)
    if max_rows is not None:
        rule = f"max_loss_tokens is {max_rows}: it must be at least the number of tokens in the loss"
        require(is_valid.view(torch.bool), rule, lambda: rule)
    chosen_head = with_values(chosen_head, hidden=head.hidden[index])
    return ChosenRows(index, num_with_gradient, chosen_head, chosen_loss, place)


def count_rows(head: HeadRows, loss: LossRows) -> Tensor:
    """[blocks, 2], int64: of each block the rows that can have a gradient, and the other rows of the loss."""
    num_rows = len(head.token_ids)
    num_blocks = cdiv(num_rows, BLOCK.tile)
    counts = torch.empty(num_blocks, 2, dtype=torch.int64, device=head.token_ids.device)
    launch_count(
        head.token_ids,
        loss.advantages,
        counts,
        programs=num_blocks,
        values=(num_rows, head.weight.shape[0]),
        WITH_BONUS=gives_every_row_a_gradient(loss),
    )
    return counts


def select_rows(
    head: HeadRows, loss: LossRows, counts: Tensor, num_chosen: int
) -> tuple[Tensor, Tensor, Tensor, HeadRows, LossRows]:
    """(index, place, whether all rows of the loss are chosen, and the records of the chosen rows)."""
    num_rows, device = len(head.token_ids), head.token_ids.device
    per_row = (head.token_ids, head.temperature, *loss.tensors)
    out = [None if x is None else torch.empty(num_chosen, dtype=x.dtype, device=device) for x in per_row]
    index, place = (torch.empty(n, dtype=torch.int64, device=device) for n in (num_chosen, num_rows))
    is_valid = torch.empty((), dtype=torch.uint8, device=device)
    launch_select(
        *per_row,
        counts,
        *out,
        index,
        place,
        is_valid,
        programs=len(counts),
        values=(num_rows, num_chosen, head.weight.shape[0]),
        WITH_BONUS=gives_every_row_a_gradient(loss),
    )
    chosen_head = with_values(head, token_ids=out[0], temperature=out[1])
    return index, place, is_valid, chosen_head, LossRows(*out[2:], *loss.options)


def spread(results: list[Tensor], chosen: ChosenRows, num_rows: int) -> list[Tensor]:
    """Results of the chosen rows as results of all rows, 0 where a row was not chosen."""
    if chosen.place is None:
        return results
    out = [result.new_empty(num_rows) for result in results]
    launch_spread(chosen.place, *results, *out, programs=cdiv(num_rows, BLOCK.tile), values=(num_rows,))
    return out


def rows_with_gradient(rows: slice, grad_tile: Tensor, token_grad: Tensor, loss: LossRows) -> tuple[slice, Tensor]:
    """All rows: only the device knows whose c_t is 0, for example by clipping. These rows add exact zeros."""
    return rows, grad_tile
