"""fused_policy_loss on the CPU: allocate the results and call the native kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...backends import native
from ..token_logprobs.cpu import raise_bad_id
from ..token_logprobs.rows import LogitRows
from .loss_rows import LossRows


class _Results(NamedTuple):
    """One float32 number per token. The kernel reads the fields of this record and of LossRows by name."""

    log_probs: Tensor
    entropy: Tensor
    token_loss: Tensor
    token_grad: Tensor


def forward_backward(
    rows: LogitRows, loss: LossRows, out: Tensor, softcap: float = 0.0, only_overflow: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log_probs, entropy, token_loss, token_grad); writes the gradient of the logits into `out`.

    out: may be the logits, or 16-bit memory in which each row begins at the address of its float32 row of logits.
    softcap: the same as in `backward` of token_logprobs/cpu.py.
    only_overflow: do not write the gradient and the entropy. The other results are 0 for a row whose loss cannot
        overflow.
    """
    log_probs = torch.empty(rows.token_ids.shape, dtype=torch.float32)
    results = _Results(log_probs, *(torch.empty_like(log_probs) for _ in range(3)))
    bad_row = native().fused_policy_loss(*rows, loss, results, out, softcap, only_overflow)
    raise_bad_id(bad_row, rows)
    return results
