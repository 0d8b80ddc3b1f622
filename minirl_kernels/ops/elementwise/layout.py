"""The memory of a result of an elementwise function: the shape and strides that torch's own result would have."""

from __future__ import annotations

import torch
from torch import Tensor


def place_for(x: Tensor) -> Tensor:
    """An empty dense tensor for f(x), with its dimensions in memory in the order of x."""
    dense = torch.contiguous_format if x.is_contiguous() else torch.preserve_format
    return torch.empty_like(x, memory_format=dense)


def place_for_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """An empty tensor for grad * f'(x), with the strides that torch derives from both tensors."""
    if grad.stride() == x.stride() or (grad.is_contiguous() and x.is_contiguous()):
        return place_for(x)
    like = (torch.empty_strided(y.shape, y.stride(), dtype=x.dtype, device="meta") for y in (grad, x))
    return x.new_empty_strided(x.shape, torch.add(*like).stride())
