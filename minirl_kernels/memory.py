"""Memory for large outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import native, unavailable_reason

# From here on page faults cost more than the kernel that fills the pages; below, an allocator reuses warm memory.
_HUGE_PAGES_FROM = 4 * 2**20


def empty_gradient(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Contiguous memory for a gradient of `tensor`, of its dtype if no other is named."""
    return empty(tensor.shape, dtype or tensor.dtype, tensor.device)


def empty(shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Contiguous memory; on the CPU it asks for huge pages before it is first touched."""
    out = torch.empty(shape, dtype=dtype, device=device)
    if out.nbytes >= _HUGE_PAGES_FROM and unavailable_reason("cpu", out.device) is None:
        native().advise_huge_pages(out.data_ptr(), out.nbytes)
    return out
