"""linear_token_logprobs on the GPU: the vendor's matmul, and the Triton kernels of token_logprobs on each tile.

They add the bias and apply the softcap as they read the logits, which costs no pass of its own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...common.triton.row_softmax import NOT_KEPT
from ..kept_logits import triton as kept_logits
from ..kept_logits.op import KeptRows
from ..matmul.vendor import matmul_into
from ..token_logprobs.rows import Epilogue
from ..token_logprobs.triton import backward as backward_of_tile
from ..token_logprobs.triton import forward as forward_of_tile

__all__ = ["backward_of_tile", "forward_of_tile", "keep_", "logits_into", "matmul_into", "rows_per_tile"]

# A tile's matmuls read the weight twice, and read and write its float32 gradient: 12 bytes of an element of a 16-bit
# head, 16 of a float32 one, for 6 operations of every row of the tile. Tensor cores do about 300 operations in the time
# that memory moves a byte, so that 4,096 rows hide those bytes and 500 do not; float32 units do about 20.
MOST_ROWS = {torch.float32: 1024, torch.bfloat16: 4096, torch.float16: 4096}
# The tile is what the whole call costs in memory beside the gradients. Of all memory, not of what is free: the order of
# the sum over tokens in the gradient of the weight is that of the tiles, and must not change from call to call.
TILE_SHARE, FEWEST_ROWS = 1 / 32, 256
# Rows of a matmul's block, and more than the elements of a token's dtype that 16 bytes hold: every tile's ids,
# temperatures, ... begin at an address of the same alignment, for which one binary is enough.
ROW_BLOCK = 128


def rows_per_tile(num_rows: int, weight: Tensor) -> int:
    """Tiles of equal size but for the last, from V, the dtype and the device; no result of a row depends on it."""
    most = MOST_ROWS[weight.dtype]
    if weight.device.type == "cuda":
        memory = torch.cuda.get_device_properties(weight.device).total_memory
        fit = int(memory * TILE_SHARE) // (4 * weight.shape[0])
        most = min(max(fit // ROW_BLOCK * ROW_BLOCK, FEWEST_ROWS), most)
    tiles = max(-(-num_rows // most), 1)
    return min(-(-num_rows // (tiles * ROW_BLOCK)) * ROW_BLOCK, num_rows)


def logits_into(tile: Tensor, hidden: Tensor, weight: Tensor, epilogue: Epilogue) -> None:
    matmul_into(tile, hidden, weight.T)


def keep_(tile: Tensor, kept: KeptRows, epilogue: Epilogue) -> None:
    kept_logits.keep_(tile, kept, NOT_KEPT.value if epilogue.softcap else -math.inf)
