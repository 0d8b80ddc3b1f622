"""Reference of softmax and log_softmax, in eager torch."""

from __future__ import annotations

import torch
from torch import Tensor


def softmax_reference(x: Tensor, dim: int, log: bool) -> Tensor:
    """e^x / sum(e^x) along `dim`, or its logarithm if `log`; in float32 or wider, rounded once to the dtype of x."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (torch.log_softmax if log else torch.softmax)(wide, dim).to(x.dtype)
