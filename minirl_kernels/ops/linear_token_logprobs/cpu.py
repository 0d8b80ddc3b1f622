"""linear_token_logprobs on the CPU: a tile of logits at a time, from hidden states to the gradients of both operands.

A tile is some hundreds of rows by the vocabulary, in float32: matmul into it, walk its rows, put the gradient of the
logits where they were (16-bit gradients fill the first half of each row), and two matmuls from that.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...backends import native
from ...checks import IGNORE_INDEX, token_id_message
from ...memory import empty
from ...native_matmul import matmul_into
from ..token_logprobs import cpu as token_logprobs

# A tile of this many bytes is what the whole call costs in memory beside its results. Fewer rows than these read and
# pack the weight, and add to its gradient, so often that it shows; large heads get a larger tile.
TILE_BYTES, MIN_ROWS = 32 * 2**20, 256


def rows_per_tile(num_rows: int, vocab_size: int) -> int:
    """Tiles of equal size; no result of a row depends on it."""
    most = max(TILE_BYTES // (4 * vocab_size), MIN_ROWS)
    tiles = max(-(-num_rows // most), 1)
    return -(-num_rows // tiles)


def check_ids(token_ids: Tensor, vocab_size: int) -> None:
    """Before any tile: the kernels that look at a tile's ids would count its rows from the tile."""
    bad = (token_ids != IGNORE_INDEX) & ((token_ids < 0) | (token_ids >= vocab_size))
    if bool(bad.any()):
        raise ValueError(token_id_message(bad.nonzero()[0].item(), token_ids, vocab_size))


def counted_rows(counts: Tensor, *per_row: Tensor | None) -> tuple[Tensor | slice, ...]:
    """(index of the rows that count, each argument at those rows); all rows are taken as they are."""
    if bool(counts.all()):
        return slice(None), *per_row
    index = counts.nonzero().squeeze(-1)
    return index, *(None if values is None else values[index] for values in per_row)


def logit_tiles(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their logits [rows, V] float32), one tile after the other in the same memory."""
    num_rows, vocab_size = hidden.shape[0], weight.shape[0]
    size = rows_per_tile(num_rows, vocab_size)
    # rows on cache lines of their own
    stride = -(-vocab_size // 16) * 16
    memory = empty((size, stride), torch.float32, hidden.device)
    for start in range(0, num_rows, max(size, 1)):
        rows = slice(start, min(start + size, num_rows))
        tile = memory[: rows.stop - start, :vocab_size]
        matmul_into(tile, hidden[rows], weight.T)
        if bias is not None:
            tile += bias
        if softcap:
            native().softcap(tile.data_ptr(), *tile.shape, stride, softcap)
        yield rows, tile


def gradient_in_place(tile: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory of `dtype` for the gradient of a tile of logits: each row begins where theirs does."""
    return tile if dtype == torch.float32 else tile.view(dtype)[:, : tile.shape[1]]


class Gradients:
    """d hidden, d weight and d bias, summed in float32 from tiles of d logits; those not needed cost nothing."""

    def __init__(self, hidden: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]):
        needs_hidden, needs_weight, needs_bias = needs
        self._operands = hidden, weight
        self.hidden = torch.zeros_like(hidden) if needs_hidden else hidden.new_empty(0)
        self.weight = empty(weight.shape if needs_weight else 0, torch.float32, weight.device)
        self.bias = torch.zeros(weight.shape[0] if needs_bias else 0)
        self._needs = needs
        self._started = False

    def add(self, rows: slice | Tensor, grad_tile: Tensor) -> None:
        """grad_tile [n, V], of the dtype of the operands: d logits of these n rows of hidden."""
        hidden, weight = self._operands
        needs_hidden, needs_weight, needs_bias = self._needs
        if not grad_tile.shape[0]:
            return
        if needs_hidden:
            self.hidden[rows] = matmul_into(torch.empty(grad_tile.shape[0], hidden.shape[1]), grad_tile, weight).to(
                hidden.dtype
            )
        if needs_weight:
            matmul_into(self.weight, grad_tile.T, hidden[rows], accumulate=self._started)
            self._started = True
        if needs_bias:
            self.bias += grad_tile.sum(0, dtype=torch.float32)

    def results(self, index: Tensor | slice, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """(d hidden of all num_rows, of which `index` took part; d weight; d bias), empty where not needed."""
        if self._needs[1] and not self._started:
            self.weight.zero_()
        hidden = self.hidden
        if self._needs[0] and not isinstance(index, slice):
            hidden = hidden.new_zeros(num_rows, hidden.shape[1])
            hidden[index] = self.hidden
        return hidden, self.weight, self.bias


def forward(hidden, weight, bias, token_ids, temperature, softcap, with_entropy) -> tuple[Tensor, ...]:
    """(log_probs, entropy or empty, shift, log_sum), [T]; rows of ignored ids are not computed."""
    check_ids(token_ids, weight.shape[0])
    outputs = [torch.zeros(token_ids.shape) for _ in range(4)]
    index, hidden, token_ids, temperature = counted_rows(token_ids != IGNORE_INDEX, hidden, token_ids, temperature)
    results = [torch.empty(token_ids.shape) for _ in range(4)]
    for rows, tile in logit_tiles(hidden, weight, bias, softcap):
        values = token_logprobs.forward(tile, token_ids[rows], temperature[rows], with_entropy)
        for result, value in zip(results, values, strict=True):
            if value.numel():
                result[rows] = value
    for output, result in zip(outputs, results, strict=True):
        output[index] = result
    return outputs[0], outputs[1] if with_entropy else torch.empty(0), outputs[2], outputs[3]


def backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    temperature: Tensor,
    softcap: float,
    shift: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    grad_log_probs: Tensor,
    grad_entropy: Tensor | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(d hidden, d weight in float32, d bias in float32); rows without a gradient are left out of every matmul."""
    num_rows = hidden.shape[0]
    counts = grad_log_probs != 0
    if grad_entropy is not None:
        counts |= grad_entropy != 0
    index, hidden, token_ids, temperature, shift, log_sum, grad_log_probs, grad_entropy = counted_rows(
        counts & (token_ids != IGNORE_INDEX),
        hidden,
        token_ids,
        temperature,
        shift,
        log_sum,
        grad_log_probs,
        grad_entropy,
    )
    if grad_entropy is not None:
        entropy = entropy[index]
    gradients = Gradients(hidden, weight, needs)
    for rows, tile in logit_tiles(hidden, weight, bias, softcap):
        grad_tile = gradient_in_place(tile, hidden.dtype)
        per_row = (token_ids[rows], temperature[rows], shift[rows], log_sum[rows])
        token_logprobs.backward(
            tile,
            *per_row,
            entropy[rows] if grad_entropy is not None else entropy,
            grad_log_probs[rows],
            None if grad_entropy is None else grad_entropy[rows],
            grad_tile,
            softcap,
        )
        gradients.add(rows, grad_tile)
    return gradients.results(index, num_rows)
