"""GPU backend of moe_experts: sorts the pairs of token and expert, and launches the Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from . import kernels
from .kernels_combine import combine
from .kernels_sort import sorted_rows
from .kernels_tiles import weight_parts


def forward(
    hidden: Tensor, weights: Tensor, experts: Tensor, gate_up_proj: Tensor, down_proj: Tensor, for_backward: bool
) -> tuple[Tensor, list[Tensor]]:
    """Returns out [T, H], and what the backward needs: gate_up [T K, 2 I] by row, pairs and begins of kernels.Rows.

    Nothing is kept unless `for_backward`.
    """
    rows = sorted_rows(experts, gate_up_proj.shape[0])
    pairs, width = experts.numel(), down_proj.shape[2]
    gate_up = hidden.new_empty((pairs, 2 * width)) if for_backward else None
    activation = hidden.new_empty((pairs, width))
    kernels.up(hidden, gate_up_proj, rows, activation, gate_up)
    out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    combine(_product(activation, down_proj, rows, out, transposed=False), weights, out)
    return out, [gate_up, rows.pairs, rows.begins] if for_backward else []


def backward(
    hidden: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    kept: list[Tensor],
    grad_out: Tensor,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor, ...]:
    """Returns (d hidden, d weights, d gate_up_proj, d down_proj), each empty where not needed.

    kept: by forward.
    """
    needs_hidden, needs_weights, needs_gate_up, needs_down = needs
    gate_up, *sorted_pairs = kept
    rows = kernels.Rows(*sorted_pairs, experts.shape[1])
    pairs, width = experts.numel(), down_proj.shape[2]
    grads = [
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if needed else tensor.new_empty(0)
        for tensor, needed in zip((hidden, weights, gate_up_proj, down_proj), needs, strict=True)
    ]
    hidden_grad, weights_grad, gate_up_proj_grad, down_proj_grad = grads
    gate_up_grad = hidden.new_empty((pairs, 2 * width)) if needs_hidden or needs_gate_up else None
    weighted = hidden.new_empty((pairs, width)) if needs_down else None
    shape = (*weights.shape, weight_parts(down_proj))
    parts = hidden.new_empty(shape, dtype=torch.float32) if needs_weights else None
    kernels.activation_grad(grad_out, down_proj, gate_up, weights, rows, gate_up_grad, weighted, parts)
    if needs_hidden:
        y = _product(gate_up_grad, gate_up_proj, rows, hidden_grad, transposed=True)
        combine(y, None, hidden_grad, parts, weights_grad)
    elif needs_weights:
        combine(None, None, None, parts, weights_grad)
    if needs_gate_up:
        kernels.weight_grad(gate_up_grad, hidden, rows, gate_up_proj_grad, left_by_token=False)
    if needs_down:
        kernels.weight_grad(grad_out, weighted, rows, down_proj_grad, left_by_token=True)
    return tuple(grads)


def _product(x: Tensor, matrix: Tensor, rows: kernels.Rows, out: Tensor, *, transposed: bool) -> Tensor:
    """The products of the pairs of each token, [T, K, columns of out] float32."""
    tokens, columns = out.shape
    y = out.new_empty((tokens, rows.top_k, columns), dtype=torch.float32)
    kernels.product(x, matrix, rows, y, transposed=transposed)
    return y
