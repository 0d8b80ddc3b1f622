"""linear_token_logprobs on the CPU: the native matmul and kernels on each tile."""

from __future__ import annotations

from torch import Tensor

from ...backends import native
from ...common.native_matmul import matmul_into
from ..kept_logits import cpu as kept_logits
from ..kept_logits.op import KeptRows
from ..token_logprobs import cpu as token_logprobs

# A tile of this many bytes is what the whole call costs in memory beside its results. Fewer rows than these read and
# pack the weight, and add to its gradient, so often that it shows; large heads get a larger tile.
TILE_BYTES, MIN_ROWS = 32 * 2**20, 256


def rows_per_tile(num_rows: int, weight: Tensor) -> int:
    """Tiles of equal size; no result of a row depends on it."""
    most = max(TILE_BYTES // (4 * weight.shape[0]), MIN_ROWS)
    tiles = max(-(-num_rows // most), 1)
    return -(-num_rows // tiles)


def logits_into(tile: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float) -> None:
    matmul_into(tile, hidden, weight.T)
    if bias is not None:
        tile += bias
    if softcap:
        native().softcap(tile, softcap)


def keep_(tile: Tensor, kept: KeptRows, softcap: float) -> None:
    kept_logits.keep_(tile, kept)  # the logits are behind their softcap


def forward_of_tile(tile, token_ids, temperature, with_entropy, bias, softcap) -> tuple[Tensor, ...]:
    return token_logprobs.forward(tile, token_ids, temperature, with_entropy)


def backward_of_tile(
    tile, token_ids, temperature, shift, log_sum, entropy, grad_log_probs, grad_entropy, grad_tile, bias, softcap
) -> None:
    token_logprobs.backward(
        tile, token_ids, temperature, shift, log_sum, entropy, grad_log_probs, grad_entropy, grad_tile, softcap
    )
