"""Every op over rows, called on rows in any layout of memory, for the interpreter and a GPU."""

from __future__ import annotations

import torch
from row_bits import strided
from torch import Tensor

import minirl_kernels as mk
from minirl_kernels.ops.fused_policy_loss import triton as fused_policy_loss
from minirl_kernels.ops.fused_policy_loss.loss_rows import LossRows
from minirl_kernels.ops.moe_routing import triton as moe_routing
from minirl_kernels.ops.rms_norm import triton as rms_norm
from minirl_kernels.ops.softmax import triton as softmax
from minirl_kernels.ops.token_logprobs import triton as token_logprobs
from minirl_kernels.ops.token_logprobs.rows import Epilogue, LogitRows, RowGradients

LAYOUTS = ((3, 0), (0, 1), (16, 3))  # (elements between two rows, elements before the first row)


def same_layout(x: Tensor) -> Tensor:
    """A copy of x, and of the memory around it, with the strides and the offset of x."""
    memory = x.untyped_storage().clone()
    return torch.empty(0, dtype=x.dtype, device=x.device).set_(memory, x.storage_offset(), x.shape, x.stride())


def assert_memory_around_is_kept(x: Tensor, before: Tensor) -> None:
    """x and `before` have one layout, and equal bytes wherever no element of x is."""
    memories = []
    for values in (x.detach(), before.detach()):
        outside = same_layout(values)
        outside.zero_()
        memories.append(torch.empty(0, dtype=x.dtype, device=x.device).set_(outside.untyped_storage()))
    assert torch.equal(*memories)


def _ids_and_values(x: Tensor) -> tuple[Tensor, Tensor]:
    """(token ids, values) of the rows, functions of the number of rows alone."""
    shape = x.shape[:-1]
    ids = torch.arange(shape.numel(), device=x.device).view(shape) % x.shape[-1]
    return ids, ids / (1 + shape.numel()) - 0.4


def _softmax(x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    outs = mk.softmax(x, backend="triton"), mk.log_softmax(x, backend="triton")
    return *outs, *(softmax.backward(grad, x, -1, log, x.dtype) for log in (False, True))


def _mean(x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    return mk.mean(x, -1, backend="triton"), mk.sum(x, -1, dtype=torch.float32, backend="triton")


def _rms_norm(x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    weight = grad[(0,) * (grad.dim() - 1)]
    out, rstd = rms_norm.forward(x, weight, 1e-6)
    return out, rstd, rms_norm.backward(grad, x, weight, rstd, True, False)[0]


def _token_logprobs(x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    ids, values = _ids_and_values(x)
    rows, epilogue = LogitRows(x, ids, values.abs() + 0.5), Epilogue(_bias(grad), 3.0)
    results = token_logprobs.forward(rows, True)
    with_head = token_logprobs.forward(rows, True, epilogue)
    _, entropy, shift, log_sum = results
    gradients = RowGradients(shift, log_sum, entropy, values, values)
    out, overwritten = same_layout(grad), same_layout(x)
    token_logprobs.backward(rows, gradients, out)
    token_logprobs.backward(rows._replace(logits=overwritten), gradients, overwritten)
    assert torch.equal(out, overwritten)
    assert_memory_around_is_kept(overwritten, same_layout(x))
    return *results, *with_head, out.clone()


def _bias(grad: Tensor) -> Tensor:
    """[V] floats in memory that begins as many elements after an aligned address as grad does."""
    offset, size = grad.storage_offset(), grad.shape[-1]
    memory = torch.zeros(offset + size, device=grad.device)
    return memory[offset:].copy_(torch.linspace(-1, 1, size))


def _fused_policy_loss(x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    ids, values = _ids_and_values(x)
    none = dict.fromkeys(("old_log_probs", "behaviour_log_probs", "ref_log_probs"))
    bounds = {"ratio_low": 0.8, "ratio_high": 1.27, "threshold": 5.0}
    penalties = {"kl_coef": 0.0, "kl_estimator": "k3", "entropy_coef": 0.01}
    loss = LossRows(**none, advantages=values, weights=values, objective="minirl", clip=True, **bounds, **penalties)
    rows, out, overwritten = LogitRows(x, ids, values.abs() + 0.5), same_layout(grad), same_layout(x)
    results = fused_policy_loss.forward_backward(rows, loss, out)
    in_place = fused_policy_loss.forward_backward(rows._replace(logits=overwritten), loss, overwritten)
    assert all(map(torch.equal, (*results, out), (*in_place, overwritten)))
    assert_memory_around_is_kept(overwritten, same_layout(x))
    return *results, out.clone()


def _moe_routing(x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    x, grad = x.flatten(0, -2), grad.flatten(0, -2)
    bias = grad[0].float()
    *routing, _ = moe_routing.forward(x, 4, None, None, True, "sigmoid", bias, 1, 1, 1.7)
    weights, experts = routing[:2]
    out = same_layout(grad)
    moe_routing.backward(x, weights, experts, weights, True, "softmax", 1.7, out)
    return *routing, out.clone()


CALLS = {
    "softmax": _softmax,
    "mean": _mean,
    "rms_norm": _rms_norm,
    "token_logprobs": _token_logprobs,
    "fused_policy_loss": _fused_policy_loss,
    "moe_routing": _moe_routing,
}


def check_layouts_of(name: str, x: Tensor, grad: Tensor) -> None:
    """The op gives rows x [T, V] and grad, in every layout, the bits that it gives contiguous ones."""
    call = CALLS[name]
    expected = call(x, grad)
    for padding, offset in LAYOUTS:
        found = call(strided(x, padding, offset), strided(grad, padding, offset))
        assert all(map(torch.equal, found, expected)), (padding, offset)
    if name != "moe_routing":
        # [B, L, V], with the entries of the batch an odd number of elements apart
        (x, grad), shape = (in_batches(x), in_batches(grad)), x.shape[:1]
        found = [values.reshape(*shape, *values.shape[2:]) for values in call(x, grad)]
        assert all(map(torch.equal, found, [values.reshape(*shape, *values.shape[1:]) for values in expected]))


def in_batches(x: Tensor) -> Tensor:
    """The rows x [T, V] as [2, T / 2, V] with a stride of 1 + T / 2 rows and 3 elements."""
    length, size = len(x) // 2, x.shape[1]
    memory = torch.zeros(2 * ((length + 1) * size + 3), dtype=x.dtype, device=x.device)
    view = memory.as_strided((2, length, size), ((length + 1) * size + 3, size, 1))
    return view.copy_(x.view(2, length, size))
