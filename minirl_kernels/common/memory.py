"""Memory of large results."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import native, unavailable_reason

# From here on new memory costs more than the rounding; below, an allocator reuses warm memory.
_LARGE = 4 * 2**20


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` as `dtype`; they are the caller's to give away: large ones on the CPU are rounded where they are.

    New memory of that size would cost a fourth of a matmul to touch. What the result leaves free goes back.
    """
    if values.dtype == dtype or torch.compiler.is_compiling() or not _is_large(values):
        return values.to(dtype)
    wide = values.view(-1)
    narrow = wide.view(dtype)[: wide.numel()]
    narrow[:1] = wide[:1].clone()
    begin = 1
    while begin < wide.numel():  # elements [n, 2n) are written over wide ones below n, which have been read
        ahead = slice(begin, min(2 * begin, wide.numel()))
        narrow[ahead] = wide[ahead]
        begin = ahead.stop
    native().release_pages(narrow.data_ptr() + narrow.nbytes, wide.nbytes - narrow.nbytes)
    # by DLPack, which gives it a storage of its own size: saving the gradient would else save all of the wide one
    return torch.from_dlpack(narrow.view(values.shape))


def _is_large(values: Tensor) -> bool:
    """Whether its pages are worth giving back, and the native module there to do it."""
    return values.nbytes >= _LARGE and unavailable_reason("cpu", values.device) is None
