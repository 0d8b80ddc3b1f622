"""GPU backend of moe_experts: sorts the pairs of token and expert, and launches the Triton kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...backends import native, unavailable_reason
from . import kernels


def forward(
    hidden: Tensor, weights: Tensor, experts: Tensor, gate_up_proj: Tensor, down_proj: Tensor, for_backward: bool
) -> tuple[Tensor, Tensor]:
    """Returns (out [T, H], gate_up [T K, 2 I]), the rows of gate_up sorted by expert.

    gate_up is kept for the backward, and empty unless `for_backward`.
    """
    rows = sorted_rows(experts, gate_up_proj.shape[0])
    pairs, width = experts.numel(), down_proj.shape[2]
    gate_up = hidden.new_empty((pairs, 2 * width) if for_backward else (0,))
    activation = hidden.new_empty((pairs, width))
    kernels.up(hidden, gate_up_proj, rows, activation, gate_up if for_backward else None)
    out = hidden.new_empty(hidden.shape)
    _combined_product(activation, down_proj, rows, weights, out, transposed=False)
    return out, gate_up


def backward(
    hidden: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up: Tensor,
    grad_out: Tensor,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor, ...]:
    """Returns (d hidden, d weights, d gate_up_proj, d down_proj), each empty where not needed."""
    needs_hidden, needs_weights, needs_gate_up, needs_down = needs
    rows = sorted_rows(experts, gate_up_proj.shape[0])
    pairs, width = experts.numel(), down_proj.shape[2]
    grads = [
        tensor.new_empty(tensor.shape if needed else (0,))
        for tensor, needed in zip((hidden, weights, gate_up_proj, down_proj), needs, strict=True)
    ]
    hidden_grad, weights_grad, gate_up_proj_grad, down_proj_grad = grads
    gate_up_grad = hidden.new_empty((pairs, 2 * width)) if needs_hidden or needs_gate_up else None
    weighted = hidden.new_empty((pairs, width)) if needs_down else None
    parts = weights.new_empty((pairs, kernels.weight_parts(width, hidden.dtype))) if needs_weights else None
    kernels.activation_grad(grad_out, down_proj, gate_up, weights, rows, gate_up_grad, weighted, parts)
    if needs_weights:
        kernels.combine(parts[..., None], None, weights_grad.view(-1, 1))
    if needs_hidden:
        _combined_product(gate_up_grad, gate_up_proj, rows, None, hidden_grad, transposed=True)
    if needs_gate_up:
        kernels.weight_grad(gate_up_grad, hidden, rows, gate_up_proj_grad, left_by_token=False)
    if needs_down:
        kernels.weight_grad(grad_out, weighted, rows, down_proj_grad, left_by_token=True)
    return tuple(grads)


def _combined_product(x, matrix, rows, weights, out, *, transposed) -> None:
    y = out.new_empty((len(out), rows.top_k, out.shape[1]), dtype=torch.float32)
    kernels.product(x, matrix, rows, y.flatten(0, 1), transposed=transposed)
    kernels.combine(y, weights, out)


def sorted_rows(experts: Tensor, num_experts: int) -> kernels.Rows:
    """The pairs of token and expert, sorted stably by expert. Pairs with an id out of range come last."""
    keys = experts.flatten()
    sort = native_sort if keys.is_cuda and has_native_sort() else torch_sort
    return kernels.Rows(*sort(keys, num_experts), experts.shape[1])


def has_native_sort() -> bool:
    """Whether the native module loads and was built with MINIRL_CUDA=ON."""
    return unavailable_reason("cpu") is None and hasattr(native(), "counting_sort")


def native_sort(keys: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    """(order, begins [num_keys + 2]) of a stable sort, by the native CUDA kernel.

    begins[k] is the first place of key k; the last two entries are the begin and the end of the keys out of range.
    """
    # a thread reads its segment twice and the count of every segment once: this number balances both
    segments = min(max(math.isqrt(2 * keys.numel()), 1), native().most_segments)
    order, begins = keys.new_empty(keys.numel()), keys.new_empty(num_keys + 2)
    places = keys.new_empty(segments, num_keys + 1)
    with torch.cuda.device_of(keys):
        stream = torch.cuda.current_stream().cuda_stream
        native().counting_sort(keys, places, begins, order, stream)
    return order, begins


def torch_sort(keys: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    """The results of native_sort, computed by torch."""
    keys = keys.where((keys >= 0) & (keys < num_keys), num_keys)
    keys, order = keys.sort(stable=True)
    return order, torch.searchsorted(keys, torch.arange(num_keys + 2, device=keys.device))
