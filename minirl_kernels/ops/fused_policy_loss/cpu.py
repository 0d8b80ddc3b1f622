"""fused_policy_loss on the CPU: allocate, call the native kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...backends import native
from ..token_logprobs.cpu import raise_bad_id
from ..token_logprobs.rows import LogitRows
from .loss_rows import LossRows


class _Results(NamedTuple):
    """One float32 number for each token. The kernel reads the fields of this record and of the loss by name."""

    log_probs: Tensor
    entropy: Tensor
    token_loss: Tensor
    token_grad: Tensor


def forward_backward(
    rows: LogitRows, loss: LossRows, out: Tensor, softcap: float = 0.0, only_overflow: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log_probs, entropy, token_loss, token_grad); the gradient of the logits goes into `out`.

    out: may be the logits themselves, or 16-bit memory that begins each row where that of the float32 logits does.
    softcap: as in token_logprobs.
    only_overflow: no gradient and no entropy; the others are 0 where no log-probability can make a loss overflow.
    """
    log_probs = torch.empty(rows.token_ids.shape, dtype=torch.float32)
    results = _Results(log_probs, *(torch.empty_like(log_probs) for _ in range(3)))
    bad_row = native().fused_policy_loss(*rows, loss, results, out, softcap, only_overflow)
    raise_bad_id(bad_row, rows)
    return results
