"""CPU backend of moe_experts: allocates the results and calls the native kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import native
from .checks import experts_message
from .packed import PackedExperts


def forward(
    hidden: Tensor, weights: Tensor, experts: Tensor, gate_up_proj: Tensor, down_proj: Tensor, for_backward: bool
) -> tuple[Tensor, list[Tensor]]:
    """Returns out [T, H], and what the backward needs: gate_up [T K, 2 I], its rows sorted by expert.

    Nothing is kept unless `for_backward`. The backward sorts again.
    """
    operands = (hidden, weights, experts, gate_up_proj, down_proj)
    out, gate_up = _forward(operands, down_proj.shape, for_backward)
    return out, [gate_up] if for_backward else []


def forward_packed(
    hidden: Tensor, weights: Tensor, experts: Tensor, gate_up_proj: PackedExperts, down_proj: PackedExperts
) -> Tensor:
    words = (weight.words.view(weight.shape[0], weight.stride) for weight in (gate_up_proj, down_proj))
    return _forward((hidden, weights, experts, *words), down_proj.shape, False)[0]


def pack(weight: Tensor, parts: int) -> PackedExperts:
    """Pack weight [E, parts * rows, columns]. Each of the `parts` matrices of an expert is packed separately."""
    stride = native().packed_words(weight, parts)
    words = torch.empty((weight.shape[0] * stride,), dtype=torch.int32, device=weight.device)
    native().pack_experts(weight, parts, words)
    return PackedExperts(words, stride, weight.shape, weight.dtype, native().isa_picked())


def _forward(operands, down_shape: torch.Size, for_backward: bool) -> tuple[Tensor, Tensor]:
    hidden, weights, experts, *projections = operands
    experts = experts.long()
    num_experts, _, width = down_shape
    pairs = experts.numel()
    out = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    gate_up = torch.empty((pairs, 2 * width) if for_backward else (0,), dtype=hidden.dtype, device=hidden.device)
    activation = torch.empty((pairs, width), dtype=hidden.dtype, device=hidden.device)
    y = torch.empty((pairs, hidden.shape[1]), dtype=torch.float32, device=hidden.device)
    bad_token = native().moe_experts(hidden, weights.float(), experts, *projections, activation, y, gate_up, out)
    if bad_token >= 0:
        raise ValueError(experts_message(bad_token, experts, num_experts))
    return out, gate_up


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
    needs_hidden, _, needs_gate_up, needs_down = needs
    (gate_up,), dtype = kept, weights.dtype
    weights, experts = weights.float(), experts.long()
    pairs, width = experts.numel(), down_proj.shape[2]

    def scratch(needed, columns, dtype):
        return torch.empty((pairs, columns) if needed else (0,), dtype=dtype, device=hidden.device)

    grads = [
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if needed else tensor.new_empty(0)
        for tensor, needed in zip((hidden, weights, gate_up_proj, down_proj), needs, strict=True)
    ]
    gate_up_grad = scratch(needs_hidden or needs_gate_up, 2 * width, hidden.dtype)
    weighted = scratch(needs_down, width, hidden.dtype)
    y = scratch(needs_hidden, hidden.shape[1], torch.float32)
    operands = (hidden, weights, experts, gate_up_proj, down_proj)
    native().moe_experts_backward(*operands, gate_up, grad_out, gate_up_grad, weighted, y, *grads)
    hidden_grad, weights_grad, *others = grads
    return hidden_grad, weights_grad.to(dtype), *others
