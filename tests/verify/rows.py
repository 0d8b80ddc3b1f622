"""Kernels over rows of elements, and the sizes at which the checks and the compiler see them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from verify.case import Case, Config, allow_wide_accesses, gap

QWEN3_VOCAB, GPT2_VOCAB = 151_936, 50_257


def once(config: Config, size: int) -> float:
    return 1.0


def twice_less_a_tile(config: Config, size: int) -> float:
    """Twice, without the last tile of the first sweep, which the second sweep keeps."""
    return 2 - min(config.tile / size, 1)


def few_numbers(config: Config) -> int:
    """Bytes of the id, the temperature, the gradient and the other numbers of a single row."""
    return 64


@dataclass(frozen=True)
class RowKernel:
    """A kernel over rows, with one set of options.

    operands(rows, size, dtype, padding, traps=...) makes the arguments of launch, as Case.operands does.
    config(size, dtype): the launch configuration.
    reads(config, size): how many times it may read each element of the rows, over all tensors of that shape.
    beside(config): the bytes that a program may read in addition to the rows.
    streams_out: whether it writes a tensor of the rows' shape. out_dtype: the dtype of that tensor, if it differs.
    sums_rows: whether it sums over the rows, so that the number of rows is the reduced size.
    """

    name: str
    operands: Callable[..., Any]
    launch: Callable[[Any], tuple[Tensor, ...]]
    config: Callable[[int, torch.dtype], Config]
    reads: Callable[[Config, int], float] = once
    beside: Callable[[Config], int] = few_numbers
    streams_out: bool = True
    out_dtype: torch.dtype | None = None
    sums_rows: bool = False

    def case(self, size: int, dtype: torch.dtype, *, rows: int = 4, padding: int = 0) -> Case:
        """With `padding` elements between two rows."""
        config = partial(self.config, size, dtype)
        rows_bytes = rows * size * dtype.itemsize

        def most_loaded(programs):
            return int(self.reads(config(), size) * rows_bytes) + self.beside(config()) * programs

        is_aligned = allow_wide_accesses(self.out_dtype or dtype, size, padding)
        return Case(
            name=self.name,
            dtype=dtype,
            size=f"{size:,}",
            sizes=f"{rows:,} rows of {size:,}{gap(padding)}",
            operands=partial(self.operands, rows, size, dtype, padding),
            launch=self.launch,
            config=config,
            most_loaded=most_loaded,
            unit="rows",
            unit_bytes=rows_bytes,
            loads_wide=is_aligned and self.reads(config(), size) >= 1,
            stores_wide=is_aligned and self.streams_out,
            alike=partial(self._alike, size, dtype, rows, padding),
        )

    def _alike(self, size: int, dtype: torch.dtype, rows: int, padding: int) -> Iterator[Case]:
        """The rows without a gap, and with gaps of 3 elements and of whole 128-bit accesses; more rows or columns."""
        for other in {0, 3, 64 // dtype.itemsize} - {padding}:
            yield self.case(size, dtype, rows=rows, padding=other)
        if self.sums_rows:
            for other in {1, size - 1, 2 * size}:
                yield self.case(other, dtype, rows=rows, padding=padding)
        else:
            yield self.case(size, dtype, rows=4 * rows, padding=padding)


def interpreted(kernel: RowKernel) -> Iterator[Case]:
    """Rows of one tile, of several tiles, of a size that no tile divides, and rows with a gap between them."""
    yield kernel.case(1_000, torch.float32)
    yield kernel.case(777, torch.bfloat16, padding=15)
    yield kernel.case(20_011, torch.float32)
    yield kernel.case(40_000, torch.bfloat16, padding=8)


def compiled(kernel: RowKernel, exponents: Iterable[int]) -> Iterator[Case]:
    """Every launch configuration of every dtype, at powers of two with these exponents and at real vocabularies.

    The odd numbers below the powers, and the odd vocabulary, have rows that allow no access of 128 bits.
    """
    powers = [2**exponent for exponent in exponents]
    odd = [power - 1 for power in powers]
    yield from launch_configurations(kernel, torch.bfloat16, powers, QWEN3_VOCAB)
    yield from launch_configurations(kernel, torch.float32, powers, QWEN3_VOCAB)
    yield from launch_configurations(kernel, torch.bfloat16, odd, GPT2_VOCAB)
    yield from launch_configurations(kernel, torch.float32, [], GPT2_VOCAB)
    yield from launch_configurations(kernel, torch.float16, [], QWEN3_VOCAB)


def launch_configurations(
    kernel: RowKernel, dtype: torch.dtype, one_tile: list[int], many_tiles: int
) -> Iterator[Case]:
    """The smallest of the sizes `one_tile` for each configuration that has the row in one tile; then `many_tiles`."""
    seen = set()
    for size in one_tile:
        config = kernel.config(size, dtype)
        if size <= config.tile and config not in seen:
            seen.add(config)
            yield kernel.case(size, dtype)
    yield kernel.case(many_tiles, dtype)


@dataclass(frozen=True)
class Rows:
    """Operands of a kernel over rows. The checks do not look at their values."""

    x: Tensor  # [R, D], as are grad and output
    grad: Tensor
    output: Tensor
    weight: Tensor  # [D]
    rstd: Tensor  # [R, 1]

    @classmethod
    def make(cls, rows: int, size: int, dtype: torch.dtype, padding: int, *, traps: bool = False) -> Rows:
        """Traps change nothing: these kernels treat all rows alike."""
        random = torch.Generator().manual_seed(size)

        def normal(*shape):
            return torch.randn(*shape, generator=random).to(dtype)

        x, grad, output = (normal(rows, size + padding)[:, :size] for _ in range(3))
        return cls(x, grad, output, normal(size), torch.rand(rows, 1, generator=random))
