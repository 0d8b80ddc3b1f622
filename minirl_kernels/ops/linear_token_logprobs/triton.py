"""linear_token_logprobs on the GPU: the vendor's matmul, and the Triton kernels of token_logprobs on each tile.

The kernels add the bias and apply the softcap while they read the logits, so neither needs an extra pass.
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

# The matmuls of a tile read the weight twice, and read and write its float32 gradient. An element of the weight costs
# 12 bytes with 16-bit weights and 16 bytes with float32 weights, for 6 operations per row of the tile. Tensor cores do
# about 300 operations per byte of memory traffic, so 4,096 rows hide the traffic and 500 do not. float32 units do 20.
MOST_ROWS = {torch.float32: 1024, torch.bfloat16: 4096, torch.float16: 4096}
# A call needs one tile of memory beside the gradients. The share is of the total memory and not of the free memory:
# the tiles set the order of the sum over tokens in the gradient of the weight, which must not change between calls.
TILE_SHARE, FEWEST_ROWS = 1 / 32, 256
# Rows of a matmul's block. 128 values of any per-token dtype fill a multiple of 16 bytes, so the ids and temperatures
# of all tiles begin at addresses of the same alignment, and one binary serves all.
ROW_BLOCK = 128


def rows_per_tile(num_rows: int, weight: Tensor) -> int:
    """The number of rows of a tile, from V, the dtype and the device; all tiles but the last have it.

    The results of a row do not depend on it.
    """
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
