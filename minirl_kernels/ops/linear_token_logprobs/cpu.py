"""linear_token_logprobs on the CPU: the native matmul and kernels on each tile."""

from __future__ import annotations

from torch import Tensor

from ...backends import native
from ...common.native_matmul import matmul_into
from ..kept_logits import cpu as kept_logits
from ..kept_logits.op import KeptRows
from ..token_logprobs import cpu as token_logprobs
from ..token_logprobs.rows import Epilogue, LogitRows, RowGradients

# A tile of this many bytes is what the whole call costs in memory beside its results. Fewer rows than these read and
# pack the weight, and add to its gradient, so often that it shows; large heads get a larger tile.
TILE_BYTES, MIN_ROWS = 32 * 2**20, 256


def rows_per_tile(num_rows: int, weight: Tensor) -> int:
    """Tiles of equal size; no result of a row depends on it."""
    most = max(TILE_BYTES // (4 * weight.shape[0]), MIN_ROWS)
    tiles = max(-(-num_rows // most), 1)
    return -(-num_rows // tiles)


def logits_into(tile: Tensor, hidden: Tensor, weight: Tensor, epilogue: Epilogue) -> None:
    matmul_into(tile, hidden, weight.T)
    if epilogue.bias is not None:
        tile += epilogue.bias
    if epilogue.softcap:
        native().softcap(tile, epilogue.softcap)


def keep_(tile: Tensor, kept: KeptRows, epilogue: Epilogue) -> None:
    kept_logits.keep_(tile, kept)  # the logits are behind their epilogue


def forward_of_tile(rows: LogitRows, with_entropy: bool, epilogue: Epilogue) -> tuple[Tensor, ...]:
    return token_logprobs.forward(rows, with_entropy)


def backward_of_tile(rows: LogitRows, gradients: RowGradients, out: Tensor, epilogue: Epilogue) -> None:
    token_logprobs.backward(rows, gradients, out, epilogue.softcap)
