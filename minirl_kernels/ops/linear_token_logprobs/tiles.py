"""A linear head in tiles of rows, on any backend: from hidden states to the gradients of both operands.

A tile is some hundreds or thousands of rows by the vocabulary, in float32: matmul into it, one sweep over its rows that
puts the gradient of the logits where they were (16-bit gradients fill the first half of each row), and two matmuls
from that.

`kernels` is a backend's module (cpu.py, triton.py), which gives rows_per_tile, logits_into, keep_, matmul_into, and
forward_of_tile and backward_of_tile, which are token_logprobs on the rows of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from ...common.checks import IGNORE_INDEX
from ..kept_logits.op import KeptRows


def counted_rows(counts: Tensor, *per_row: Tensor | KeptRows | None) -> tuple[Tensor | slice, ...]:
    """(index of the rows that count, each argument at those rows); all rows are taken as they are.

    How many rows count is what the host waits for, the one time in a call.
    """
    index = counts.nonzero().squeeze(-1)
    if len(index) == len(counts):
        index = slice(None)
    return index, *at_rows(index, *per_row)


def at_rows(index: Tensor | slice, *per_row: Tensor | KeptRows | None) -> list[Tensor | KeptRows | None]:
    return [None if values is None else values[index] for values in per_row]


def logit_tiles(
    kernels: ModuleType,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float,
    kept: KeptRows | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their tile [rows, V] float32), one after the other in the same memory; -inf what was not kept."""
    num_rows, vocab_size = hidden.shape[0], weight.shape[0]
    size = kernels.rows_per_tile(num_rows, weight)
    # rows on cache lines of their own, and at addresses that allow accesses of any width
    stride = -(-vocab_size // 16) * 16
    memory = torch.empty((size, stride), dtype=torch.float32, device=hidden.device)
    for start in range(0, num_rows, max(size, 1)):
        rows = slice(start, min(start + size, num_rows))
        tile = memory[: rows.stop - start, :vocab_size]
        kernels.logits_into(tile, hidden[rows], weight, bias, softcap)
        if kept is not None:
            kernels.keep_(tile, kept[rows], softcap)
        yield rows, tile


def gradient_in_place(tile: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory of `dtype` for the gradient of a tile of logits: each row begins where theirs does."""
    return tile if dtype == torch.float32 else tile.view(dtype)[:, : tile.shape[1]]


class Gradients:
    """d hidden, d weight and d bias, summed in float32 from tiles of d logits; those not needed cost nothing.

    The sums over tokens are in the order of the tiles, and so the only results that depend on how rows are tiled.
    """

    def __init__(self, kernels: ModuleType, hidden: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]):
        needs_hidden, needs_weight, needs_bias = needs
        self._kernels = kernels
        self._operands = hidden, weight
        self.hidden = torch.zeros_like(hidden) if needs_hidden else hidden.new_empty(0)
        self.weight = torch.empty(weight.shape if needs_weight else 0, dtype=torch.float32, device=weight.device)
        self.bias = hidden.new_zeros(weight.shape[0] if needs_bias else 0, dtype=torch.float32)
        self._needs = needs
        self._started = False

    def add(self, rows: slice | Tensor, grad_tile: Tensor) -> None:
        """grad_tile [n, V], of the dtype of the operands: d logits of these n rows of hidden."""
        hidden, weight = self._operands
        needs_hidden, needs_weight, needs_bias = self._needs
        if not grad_tile.shape[0]:
            return
        if needs_hidden:
            out = hidden.new_empty(grad_tile.shape[0], hidden.shape[1], dtype=torch.float32)
            self.hidden[rows] = self._kernels.matmul_into(out, grad_tile, weight).to(hidden.dtype)
        if needs_weight:
            self._kernels.matmul_into(self.weight, grad_tile.T, hidden[rows], accumulate=self._started)
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


def forward(
    kernels, hidden, weight, bias, token_ids, temperature, softcap, kept_ids, kept_offsets, with_entropy
) -> tuple[Tensor, ...]:
    """(log_probs, entropy or empty, shift, log_sum), [T]; rows of ignored ids are not computed."""
    outputs = [torch.zeros_like(temperature) for _ in range(4)]
    kept = KeptRows.of(kept_ids, kept_offsets)
    index, hidden, token_ids, temperature, kept = counted_rows(
        token_ids != IGNORE_INDEX, hidden, token_ids, temperature, kept
    )
    results = temperature.new_empty(4, len(token_ids))
    for rows, tile in logit_tiles(kernels, hidden, weight, bias, softcap, kept):
        values = kernels.forward_of_tile(tile, token_ids[rows], temperature[rows], with_entropy, bias, softcap)
        for result, value in zip(results, values, strict=True):
            if value.numel():
                result[rows] = value
    for output, result in zip(outputs, results, strict=True):
        output[index] = result
    log_probs, entropy, shift, log_sum = outputs
    return log_probs, entropy if with_entropy else entropy.new_empty(0), shift, log_sum


def backward(
    kernels: ModuleType,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    temperature: Tensor,
    softcap: float,
    kept_ids: Tensor | None,
    kept_offsets: Tensor | None,
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
    index, hidden, token_ids, temperature, kept, shift, log_sum, grad_log_probs, grad_entropy, entropy = counted_rows(
        counts & (token_ids != IGNORE_INDEX),
        hidden,
        token_ids,
        temperature,
        KeptRows.of(kept_ids, kept_offsets),
        shift,
        log_sum,
        grad_log_probs,
        grad_entropy,
        None if grad_entropy is None else entropy,
    )
    gradients = Gradients(kernels, hidden, weight, needs)
    for rows, tile in logit_tiles(kernels, hidden, weight, bias, softcap, kept):
        grad_tile = gradient_in_place(tile, hidden.dtype)
        per_row = (token_ids, temperature, shift, log_sum, entropy, grad_log_probs, grad_entropy)
        kernels.backward_of_tile(tile, *at_rows(rows, *per_row), grad_tile, bias, softcap)
        gradients.add(rows, grad_tile)
    return gradients.results(index, num_rows)
