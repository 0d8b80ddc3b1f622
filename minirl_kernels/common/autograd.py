"""Gradients that the forward of a loss computed, and their way into autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from .memory import rounded


def attach_gradient(loss: Tensor, tensor: Tensor, grad: Tensor) -> Tensor:
    """`loss` with d loss / d tensor = grad, in addition to the gradients that `loss` already has."""
    return _AttachGradient.apply(loss, tensor, grad)


def attach_gradient_once(loss: Tensor, pairs: list[tuple[Tensor, Tensor]], call: str) -> Tensor:
    """attach_gradient for gradients too large to copy: the first backward scales them in place and returns them.

    pairs: (tensor, grad). A float32 grad of a 16-bit tensor is rounded after the scaling.
    call: the name of the public function, for the error message.
    The backward raises RuntimeError when it runs a second time.
    """
    tensors, grads = zip(*pairs, strict=True)
    return _HandOverGradients.apply(loss, call, *tensors, *grads)


class _AttachGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, tensor, grad):
        ctx.save_for_backward(grad)
        ctx.dtype = tensor.dtype
        return loss.detach()  # another tensor of the same memory, which no caller has

    @staticmethod
    def backward(ctx, grad_output):
        (grad,) = ctx.saved_tensors
        return grad_output, (grad_output * grad).to(ctx.dtype), None


class _HandOverGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, call, *tensors_and_grads):
        count = len(tensors_and_grads) // 2
        ctx.dtypes = [tensor.dtype for tensor in tensors_and_grads[:count]]
        ctx.grads, ctx.call = tensors_and_grads[count:], call
        return loss.detach()

    @staticmethod
    def backward(ctx, grad_output):
        if ctx.grads is None:
            raise RuntimeError(
                f"{ctx.call} made its gradient in the forward, and an earlier backward has consumed that buffer: "
                "call it again, or use token_logprobs with policy_loss to run backward twice through one graph"
            )
        grads, none = ctx.grads, [None] * len(ctx.grads)
        if torch.compiler.is_compiling():  # the compiler decides whether to reuse the buffers
            grads = [grad * grad_output for grad in grads]
        else:
            ctx.grads = None
            for grad in grads:
                _scale_in_place(grad, grad_output)
        return grad_output, None, *(rounded(grad, dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True)), *none


def _scale_in_place(grad: Tensor, factor: Tensor) -> None:
    # The factor is nearly always 1. On a GPU the kernel reads it, because item() would wait for the device.
    if grad.is_cuda:
        from .triton.scale import scale_in_place  # Triton may be absent

        scale_in_place(grad, factor)
    elif factor.item() != 1:
        grad.mul_(factor)
