"""moe_experts: the weighted sum of the gated experts of each token.

With e = experts[t, k], and (gate, up) the two halves of gate_up_proj[e] hidden[t]:
    out[t] = sum_k weights[t, k] down_proj[e] (silu(gate) * up)
Sums are float32. The activation silu(gate) * up and the result are each rounded once to the dtype of hidden. The
experts of a token are added in the order of its routing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import native, resolve
from ...common.checks import check_device, check_float_matrix, check_integers, check_like, check_tensor
from ...common.library import Op
from ..moe_routing import Routing
from .checks import checked_experts
from .packed import PackedExperts
from .reference import moe_experts_reference

OP = Op(__package__)


def moe_experts(
    hidden: Tensor,
    routing: Routing | tuple[Tensor, Tensor],
    gate_up_proj: Tensor | PackedExperts,
    down_proj: Tensor | PackedExperts,
    *,
    activation: str = "silu",
    backend: str = "auto",
) -> Tensor:
    """The weighted sum of the outputs of each token's experts.

    hidden: [T, H], float32, bfloat16 or float16, last dimension contiguous.
    routing: the Routing of moe_routing, or a pair (weights, experts): [T, K] floating point, used as float32, and
        [T, K] integers. On the CPU an expert id outside [0, E) raises ValueError. On a GPU it makes the result of the
        token NaN, and its gradients by hidden and by the weight of that expert. It does not change other tokens, and
        adds nothing to the gradients of the projections.
    gate_up_proj: [E, 2 I, H], of the dtype of hidden, last dimension contiguous; the I rows of the gate come first.
    down_proj: [E, H, I], of the dtype of hidden, last dimension contiguous. Autocast casts hidden and both projections.
        Both projections may be PackedExperts from pack_experts: equal bits in less time, without a gradient.
    activation: "silu", the only one supported.
    Returns [T, H] of the dtype of hidden, differentiable by hidden, the weights and both projections.
    Raises ValueError or TypeError that names the argument, RuntimeError for a backend that is missing.
    The bits of a token's result depend on neither the rest of the batch nor the number of threads. The same is true of
    its gradients by hidden and the weights. The gradients of the projections have equal bits in every run.
    The forward keeps gate and up for the backward: 2 I numbers for each of the T K pairs of token and expert. On a GPU
    it keeps the order of the pairs too, one int64 for each.
    """
    check_tensor("hidden", hidden)
    if isinstance(gate_up_proj, PackedExperts) or isinstance(down_proj, PackedExperts):
        return _with_packed(hidden, routing, gate_up_proj, down_proj, activation, backend)
    check_tensor("gate_up_proj", gate_up_proj)
    check_tensor("down_proj", down_proj)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, gate_up_proj, down_proj = (tensor.to(dtype) for tensor in (hidden, gate_up_proj, down_proj))
    _check_operands(hidden, gate_up_proj, down_proj)
    weights, experts = _check_routing(routing, hidden)
    _check_activation(activation)
    backend = OP.resolve(backend, hidden.device)
    if backend == "reference":
        weights, experts = weights.float(), experts.long()
        if hidden.device.type == "cpu":
            experts = checked_experts(experts, gate_up_proj.shape[0])
        return moe_experts_reference(hidden, weights, experts, gate_up_proj, down_proj)
    operands = (hidden, weights, experts, gate_up_proj, down_proj)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in operands):
        return _MoEExperts.apply(*operands, backend)
    return moe_experts_forward(*operands, False, backend)[0]


def pack_experts(gate_up_proj: Tensor, down_proj: Tensor) -> tuple[PackedExperts, PackedExperts]:
    """Copies of both projections in the memory order of the CPU kernels, for many calls of moe_experts.

    gate_up_proj, down_proj: as in moe_experts, on the CPU. Later changes of them do not change the copies.
    Returns (gate_up_proj, down_proj) for moe_experts, for the instruction set that is in use now.
    Raises ValueError or TypeError that names the argument, RuntimeError if the native module is missing.
    A copy takes the memory of its projection, or twice as much for a 16-bit dtype that the processor cannot multiply.
    """
    check_tensor("gate_up_proj", gate_up_proj)
    check_tensor("down_proj", down_proj)
    _check_operands(gate_up_proj.new_empty(0, gate_up_proj.shape[-1]), gate_up_proj, down_proj)
    resolve("cpu", gate_up_proj.device, op="pack_experts", supported=("cpu",))
    pack = OP.kernels("cpu").pack
    return pack(gate_up_proj.detach(), 2), pack(down_proj.detach(), 1)


def _with_packed(hidden, routing, gate_up_proj, down_proj, activation, backend) -> Tensor:
    packed = {"gate_up_proj": gate_up_proj, "down_proj": down_proj}
    for name, value in packed.items():
        if not isinstance(value, PackedExperts):
            raise TypeError(f"{name} is a {type(value).__name__}: it must be packed, like the other projection")
        if value.dtype != hidden.dtype:
            raise TypeError(f"{name} was packed from {value.dtype}: it must have the dtype of hidden, {hidden.dtype}")
        picked = native().isa_picked()
        if value.instruction_set != picked:
            raise ValueError(f"{name} was packed for {value.instruction_set}: it must be for {picked}, which runs now")
    check_float_matrix("hidden", hidden)
    if hidden.dim() != 2:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}: it must be [T, H]")
    _check_shapes(gate_up_proj, down_proj, hidden.shape[1])
    weights, experts = _check_routing(routing, hidden)
    _check_activation(activation)
    if torch.is_grad_enabled() and (hidden.requires_grad or weights.requires_grad):
        raise ValueError(
            "gate_up_proj is packed: it must be a tensor where a gradient is wanted, or call under no_grad"
        )
    resolve("cpu" if backend == "auto" else backend, hidden.device, op="moe_experts, packed", supported=("cpu",))
    return OP.kernels("cpu").forward_packed(hidden, weights, experts, gate_up_proj, down_proj)


def _check_activation(activation) -> None:
    if activation != "silu":
        raise ValueError(f"activation is {activation!r}: it must be 'silu'")


def _check_operands(hidden, gate_up_proj, down_proj) -> None:
    check_float_matrix("hidden", hidden)
    if hidden.dim() != 2:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}: it must be [T, H]")
    _check_projection("gate_up_proj", gate_up_proj, hidden)
    _check_projection("down_proj", down_proj, hidden)
    _check_shapes(gate_up_proj, down_proj, hidden.shape[1])


def _check_shapes(gate_up_proj, down_proj, hidden_size) -> None:
    num_experts, rows, columns = gate_up_proj.shape
    if num_experts == 0 or rows == 0 or rows % 2 or columns != hidden_size:
        raise ValueError(
            f"gate_up_proj has shape {tuple(gate_up_proj.shape)}: it must be [E, 2 I, {hidden_size}], H of hidden last"
        )
    expected = (num_experts, hidden_size, rows // 2)
    if down_proj.shape != expected:
        raise ValueError(
            f"down_proj has shape {tuple(down_proj.shape)}: it must be {expected} for this gate_up_proj and hidden"
        )


def _check_projection(name, value, hidden) -> None:
    if value.dtype != hidden.dtype:
        raise TypeError(f"{name} has dtype {value.dtype}: it must be the dtype of hidden, {hidden.dtype}")
    if value.dim() != 3:
        raise ValueError(f"{name} has shape {tuple(value.shape)}: it must have three dimensions, E first")
    if value.shape[-1] > 1 and value.stride(-1) != 1:
        raise ValueError(
            f"{name} has strides {tuple(value.stride())}: its last dimension must be contiguous (stride 1)"
        )
    check_device(name, value, hidden.device)


def _check_routing(routing, hidden) -> tuple[Tensor, Tensor]:
    """(weights, experts), both contiguous."""
    if not isinstance(routing, tuple) or len(routing) < 2:
        raise TypeError(f"routing is a {type(routing).__name__}: it must be a Routing, or a pair (weights, experts)")
    weights, experts = routing[:2]
    check_tensor("routing.weights", weights)
    if not weights.is_floating_point():
        raise TypeError(f"routing.weights has dtype {weights.dtype}: it must be a floating point tensor")
    tokens = hidden.shape[0]
    if weights.dim() != 2 or weights.shape[0] != tokens or weights.shape[1] == 0:
        raise ValueError(f"routing.weights has shape {tuple(weights.shape)}: it must be [{tokens}, K], T of hidden")
    check_device("routing.weights", weights, hidden.device)
    check_integers("routing.experts", experts)
    check_like("routing.experts", experts, weights.shape, hidden.device)
    return weights.contiguous(), experts.contiguous()


class _MoEExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weights, experts, gate_up_proj, down_proj, backend):
        operands = (hidden, weights, experts, gate_up_proj, down_proj)
        out, kept = moe_experts_forward(*operands, True, backend)
        ctx.save_for_backward(*operands, *kept)
        ctx.backend = backend
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        hidden, weights, _, gate_up, down, *_ = ctx.needs_input_grad
        needs = (hidden, weights, gate_up, down)
        saved = ctx.saved_tensors  # once: gradient checkpointing refuses a second reading
        grads = moe_experts_backward(*saved[:5], saved[5:], grad_out.contiguous(), *needs, ctx.backend)
        grads = [grad if needed else None for grad, needed in zip(grads, needs, strict=True)]
        return *grads[:2], None, *grads[2:], None


def _forward(kernels, hidden, weights, experts, gate_up_proj, down_proj, for_backward):
    return kernels.forward(hidden, weights, experts, gate_up_proj, down_proj, for_backward)


def _forward_fake(hidden, weights, experts, gate_up_proj, down_proj, for_backward, backend):
    out = hidden.new_empty(hidden.shape)
    if not for_backward:
        return out, []
    gate_up = hidden.new_empty((experts.numel(), gate_up_proj.shape[1]))
    if backend != "triton":
        return out, [gate_up]
    sizes = (experts.numel(), gate_up_proj.shape[0] + 2)
    return out, [gate_up, *(experts.new_empty(size, dtype=torch.int64) for size in sizes)]


def _backward(kernels, hidden, weights, experts, gate_up_proj, down_proj, kept, grad_out, *needs):
    return kernels.backward(hidden, weights, experts, gate_up_proj, down_proj, kept, grad_out, needs)


def _backward_fake(hidden, weights, experts, gate_up_proj, down_proj, kept, grad_out, *needs_and_backend):
    tensors = (hidden, weights, gate_up_proj, down_proj)
    return tuple(
        tensor.new_empty(tensor.shape if needed else (0,))
        for tensor, needed in zip(tensors, needs_and_backend[:4], strict=True)
    )


_OPERANDS = "Tensor hidden, Tensor weights, Tensor experts, Tensor gate_up_proj, Tensor down_proj"
moe_experts_forward = OP.define(
    f"moe_experts({_OPERANDS}, bool for_backward, str backend) -> (Tensor out, Tensor[] kept)",
    _forward,
    _forward_fake,
)
moe_experts_backward = OP.define(
    f"moe_experts_backward({_OPERANDS}, Tensor[] kept, Tensor grad_out, "
    "bool needs_hidden, bool needs_weights, bool needs_gate_up_proj, bool needs_down_proj, str backend) -> "
    "(Tensor grad_hidden, Tensor grad_weights, Tensor grad_gate_up_proj, Tensor grad_down_proj)",
    _backward,
    _backward_fake,
)
