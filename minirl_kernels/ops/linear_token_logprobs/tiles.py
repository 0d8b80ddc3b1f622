"""A linear head in tiles of rows, on any backend: the log-probabilities, and the gradients of hidden, weight and bias.

A tile holds the float32 logits of some hundreds or thousands of rows. A matmul fills it. The forward reduces each row.
The backward fills the tile again and overwrites the logits with their gradient. A 16-bit gradient fills the first half
of each row. Two more matmuls make the gradients of hidden and weight from the tile.

The epilogue is the bias and the softcap. The CPU applies it to the tile. On a GPU the tile holds the logits before the
epilogue, and the kernels apply it as they read a row.

`kernels` is the module of a backend (cpu.py or triton.py). It has rows_per_tile, logits_into, keep_, matmul_into, and
forward_of_tile and backward_of_tile, which are token_logprobs on the rows of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from ...common.checks import IGNORE_INDEX
from ...common.records import at_rows, with_values
from ..kept_logits.op import KeptRows
from ..token_logprobs.rows import LogitRows, RowGradients
from .head import HeadRows, Needs


def rows_that_count(is_counted: Tensor) -> Tensor | slice:
    """The index of the rows where is_counted is True, or a slice of all rows if it is True everywhere.

    The host waits for the device here, for the number of these rows, and nowhere else in a call.
    """
    index = is_counted.nonzero().squeeze(-1)
    return slice(None) if len(index) == len(is_counted) else index


def kept_at(head: HeadRows, index: Tensor | slice) -> KeptRows | None:
    """The kept sets of these rows of a head."""
    kept = head.kept
    return None if kept is None else kept[index]


def logit_tiles(kernels: ModuleType, head: HeadRows, kept: KeptRows | None = None) -> Iterator[tuple[slice, LogitRows]]:
    """(rows, the LogitRows of these rows) of each tile. All tiles use the same memory, [rows, V] float32.

    The logit of a token that was not kept is -inf. If a kernel has yet to apply a softcap, the logit is NOT_KEPT, and
    the kernel reads it as -inf after the softcap.
    """
    num_rows, vocab_size = head.hidden.shape[0], head.weight.shape[0]
    size = kernels.rows_per_tile(num_rows, head.weight)
    # no two rows share a cache line, and every row begins at an address that allows accesses of any width
    stride = -(-vocab_size // 16) * 16
    memory = torch.empty((size, stride), dtype=torch.float32, device=head.hidden.device)
    for start in range(0, num_rows, max(size, 1)):
        rows = slice(start, min(start + size, num_rows))
        tile = memory[: rows.stop - start, :vocab_size]
        kernels.logits_into(tile, head.hidden[rows], head.weight, head.epilogue)
        if kept is not None:
            kernels.keep_(tile, kept[rows], head.epilogue)
        yield rows, LogitRows(tile, head.token_ids[rows], head.temperature[rows])


def gradient_in_place(tile: Tensor, dtype: torch.dtype) -> Tensor:
    """The memory of a tile of logits as rows of `dtype` for the gradient. A row begins at the address of its logits."""
    return tile if dtype == torch.float32 else tile.view(dtype)[:, : tile.shape[1]]


class Gradients:
    """d hidden, d weight and d bias, made from tiles of d logits. Gradients that are not needed are not computed.

    d weight and d bias are summed over tokens in float32, in the order of the tiles. They are the only results that
    depend on the size of the tiles. index: of the rows of the head among num_rows rows of d hidden; the other rows of
    d hidden are 0.
    """

    def __init__(self, kernels: ModuleType, head: HeadRows, needs: Needs, index: Tensor | slice, num_rows: int):
        hidden, weight = head.hidden, head.weight
        self._kernels = kernels
        self._operands = hidden, weight
        self._index = index
        self.hidden = hidden.new_zeros((num_rows, hidden.shape[1]) if needs.needs_hidden else 0)
        self.weight = torch.empty(weight.shape if needs.needs_weight else 0, dtype=torch.float32, device=weight.device)
        self.bias = hidden.new_zeros(weight.shape[0] if needs.needs_bias else 0, dtype=torch.float32)
        self._needs = needs
        self._started = False

    def add(self, rows: slice | Tensor, grad_tile: Tensor) -> None:
        """Add a tile. grad_tile: d logits of these n rows of hidden, [n, V], in the dtype of hidden and weight."""
        hidden, weight = self._operands
        if not grad_tile.shape[0]:
            return
        if self._needs.needs_hidden:
            out = hidden.new_empty(grad_tile.shape[0], hidden.shape[1], dtype=torch.float32)
            place = rows if isinstance(self._index, slice) else self._index[rows]
            self.hidden[place] = self._kernels.matmul_into(out, grad_tile, weight).to(hidden.dtype)
        if self._needs.needs_weight:
            self._kernels.matmul_into(self.weight, grad_tile.T, hidden[rows], accumulate=self._started)
            self._started = True
        if self._needs.needs_bias:
            self.bias += grad_tile.sum(0, dtype=torch.float32)

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """(d hidden, d weight, d bias), empty if not needed."""
        if self._needs.needs_weight and not self._started:
            self.weight.zero_()
        return self.hidden, self.weight, self.bias


def forward(kernels: ModuleType, head: HeadRows, with_entropy: bool) -> tuple[Tensor, ...]:
    """(log_probs, entropy or empty, shift, log_sum), [T]. Rows of ignored ids are not computed."""
    outputs = [torch.zeros_like(head.temperature) for _ in range(4)]
    index = rows_that_count(head.token_ids != IGNORE_INDEX)
    head, kept = head.at(index), kept_at(head, index)
    results = head.temperature.new_empty(4, len(head.token_ids))
    for rows, logit_rows in logit_tiles(kernels, head, kept):
        values = kernels.forward_of_tile(logit_rows, with_entropy, head.epilogue)
        for result, value in zip(results, values, strict=True):
            if value.numel():
                result[rows] = value
    for output, result in zip(outputs, results, strict=True):
        output[index] = result
    log_probs, entropy, shift, log_sum = outputs
    return log_probs, entropy if with_entropy else entropy.new_empty(0), shift, log_sum


def backward(
    kernels: ModuleType, head: HeadRows, gradients: RowGradients, needs: Needs
) -> tuple[Tensor, Tensor, Tensor]:
    """(d hidden, d weight in float32, d bias in float32). Rows without a gradient are left out of every matmul."""
    num_rows = head.hidden.shape[0]
    has_gradient = gradients.grad_log_probs != 0
    if gradients.grad_entropy is None:
        gradients = with_values(gradients, entropy=None)
    else:
        has_gradient |= gradients.grad_entropy != 0
    index = rows_that_count(has_gradient & (head.token_ids != IGNORE_INDEX))
    head, kept, gradients = head.at(index), kept_at(head, index), at_rows(gradients, index)
    sums = Gradients(kernels, head, needs, index, num_rows)
    for rows, logit_rows in logit_tiles(kernels, head, kept):
        grad_tile = gradient_in_place(logit_rows.logits, head.hidden.dtype)
        kernels.backward_of_tile(logit_rows, at_rows(gradients, rows), grad_tile, head.epilogue)
        sums.add(rows, grad_tile)
    return sums.results()
