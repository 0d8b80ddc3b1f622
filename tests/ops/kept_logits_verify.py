"""Cases of the kernel of kept_logits, which writes -inf outside of each token's set."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from verify.case import Case
from verify.logits import EXPONENTS, LogitOperands
from verify.rows import RowKernel, compiled, interpreted

from minirl_kernels.ops.kept_logits import triton
from minirl_kernels.ops.kept_logits.op import KeptRows


def _launch(rows: LogitOperands) -> tuple[Tensor, ...]:
    """The sets are the first token, no set, the last token, and two in the middle; the other rows have no set."""
    vocab_size = rows.logits.shape[1]
    middle = vocab_size // 2
    ids = torch.tensor([0, vocab_size - 1, middle, middle + 1], dtype=torch.int32)
    begin, end = (torch.zeros(len(rows.logits), dtype=torch.int32) for _ in range(2))
    begin[:4], end[:4] = torch.tensor([0, 1, 1, 2]), torch.tensor([1, 1, 2, 4])
    triton.keep_(rows.logits, KeptRows(ids, begin, end))
    first, _, last, both = rows.logits[:4]
    return first[1:], last[:-1], both[:middle], both[middle + 2 :]


KERNEL = RowKernel("kept_logits", LogitOperands.make, _launch, triton.launch_config, reads=lambda config, size: 0.0)


def interpreter_cases() -> Iterator[Case]:
    yield from interpreted(KERNEL)


def compile_cases() -> Iterator[Case]:
    yield from compiled(KERNEL, EXPONENTS)
