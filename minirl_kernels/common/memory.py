"""Rounding of large results in their own memory."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import native, unavailable_reason

# bytes from which new memory costs more time than the rounding; smaller results reuse memory of the allocator
_LARGE = 4 * 2**20


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` rounded to `dtype`. Large values on the CPU are overwritten, so the caller must not use them again.

    New memory of that size costs a fourth of the time of a matmul. Memory behind the result goes back to the system.
    """
    if values.dtype == dtype or torch.compiler.is_compiling() or not _is_large(values):
        return values.to(dtype)
    wide = values.view(-1)
    narrow = wide.view(dtype)[: wide.numel()]
    narrow[:1] = wide[:1].clone()
    begin = 1
    while begin < wide.numel():  # elements [n, 2n) overwrite wide elements below n, which have been read
        ahead = slice(begin, min(2 * begin, wide.numel()))
        narrow[ahead] = wide[ahead]
        begin = ahead.stop
    native().release_pages(narrow.data_ptr() + narrow.nbytes, wide.nbytes - narrow.nbytes)
    # DLPack gives the result a storage of its own size: else torch.save would store the wide one
    return torch.from_dlpack(narrow.view(values.shape))


def _is_large(values: Tensor) -> bool:
    """Whether rounding in place is worth it, and the native module can release the pages."""
    return values.nbytes >= _LARGE and unavailable_reason("cpu", values.device) is None
