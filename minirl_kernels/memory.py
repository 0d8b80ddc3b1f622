"""Memory for large outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import native, unavailable_reason

# From here on page faults cost more than the kernel that fills the pages; below, an allocator reuses warm memory.
_HUGE_PAGES_FROM = 4 * 2**20


def empty_gradient(tensor: Tensor) -> Tensor:
    """Contiguous memory for a gradient of `tensor`."""
    return empty(tensor.shape, tensor.dtype, tensor.device)


def empty(shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Contiguous memory; on the CPU it asks for huge pages before it is first touched."""
    return in_huge_pages(torch.empty(shape, dtype=dtype, device=device))


def in_huge_pages(out: Tensor) -> Tensor:
    """Dense memory that was not touched yet; on the CPU it asks for huge pages, where it is large."""
    if _is_large(out):
        native().advise_huge_pages(out.data_ptr(), out.nbytes)
    return out


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
    """Whether its pages are worth an advice, and the native module there to give it."""
    return values.nbytes >= _HUGE_PAGES_FROM and unavailable_reason("cpu", values.device) is None
