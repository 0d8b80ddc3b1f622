"""References of the elementwise functions, in eager torch. They also run on GPUs."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

REFERENCES: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "gelu": lambda x, *_: F.gelu(x),
    "gelu_tanh": lambda x, *_: F.gelu(x, approximate="tanh"),
    "mish": lambda x, *_: F.mish(x),
    "sigmoid": lambda x, *_: x.sigmoid(),
    "silu": lambda x, *_: F.silu(x),
    "softplus": lambda x, beta, threshold: F.softplus(x, beta, threshold),
}
