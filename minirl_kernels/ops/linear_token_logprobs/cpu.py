"""linear_token_logprobs on the CPU: the native matmul and kernels on each tile."""

from __future__ import annotations

from torch import Tensor

from ...backends import native
from ...common.native_matmul import matmul_into
from ..kept_logits import cpu as kept_logits
from ..kept_logits.op import KeptRows
from ..token_logprobs import cpu as token_logprobs
from ..token_logprobs.rows import Epilogue, LogitRows, RowGradients

# A call needs one tile of this many bytes beside its results. With fewer than MIN_ROWS rows, reading the weight and
# adding to its gradient would dominate, so large heads get a larger tile.
TILE_BYTES, MIN_ROWS = 32 * 2**20, 256


def rows_per_tile(num_rows: int, weight: Tensor) -> int:
    """The number of rows of a tile; all tiles but the last have it. The results of a row do not depend on it."""
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
    kept_logits.keep_(tile, kept)  # the tile already includes the epilogue


def forward_of_tile(rows: LogitRows, with_entropy: bool, epilogue: Epilogue) -> tuple[Tensor, ...]:
    return token_logprobs.forward(rows, with_entropy)


def backward_of_tile(rows: LogitRows, gradients: RowGradients, out: Tensor, epilogue: Epilogue) -> None:
    token_logprobs.backward(rows, gradients, out, epilogue.softcap)
