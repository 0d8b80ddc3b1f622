"""A loss whose gradients were made with it: how they are handed to autograd."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor


def attach_gradient(loss: Tensor, tensor: Tensor, grad: Tensor) -> Tensor:
    """`loss` with d loss / d tensor = grad, added to what gradient it already carries."""
    return _AttachGradient.apply(loss, tensor, grad)


def attach_gradient_once(loss: Tensor, tensor: Tensor, grad: Tensor, call: str) -> Tensor:
    """The same for a gradient too large to copy: the first backward scales it in place and hands it over.

    A second backward raises RuntimeError in the name of `call`.
    """
    return _HandOverGradient.apply(loss, tensor, grad, call)


class _AttachGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, tensor, grad):
        ctx.save_for_backward(grad)
        ctx.dtype = tensor.dtype
        return loss.clone()

    @staticmethod
    def backward(ctx, grad_output):
        (grad,) = ctx.saved_tensors
        return grad_output, (grad_output * grad).to(ctx.dtype), None


class _HandOverGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, tensor, grad, call):
        ctx.grad, ctx.call = grad, call
        return loss.clone()

    @staticmethod
    def backward(ctx, grad_output):
        if ctx.grad is None:
            raise RuntimeError(
                f"{ctx.call} made its gradient in the forward, and an earlier backward has consumed that buffer: "
                "call it again, or use token_logprobs with policy_loss, where one graph is to be run backward twice"
            )
        if torch.compiler.is_compiling():  # the compiler knows whether anybody else still needs the buffer
            return grad_output, ctx.grad * grad_output, None, None
        grad, ctx.grad = ctx.grad, None
        _scale_in_place(grad, grad_output)
        return grad_output, grad, None, None


def _scale_in_place(grad: Tensor, factor: Tensor) -> None:
    # nearly always 1: a pass over the gradient is worth a look, but no wait for a GPU, whose kernel looks itself
    if grad.device.type == "cuda":
        importlib.import_module(".triton_scale", __package__).scale_in_place(grad, factor)
    elif factor.item() != 1:
        grad.mul_(factor)
