"""The Triton kernels of softmax, rms_norm and mean and how to call them, one launch at a time: those of the cases that
have rows and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..common.triton.launch import LaunchConfig
from ..ops.mean import triton as mean
from ..ops.mean.triton import ColumnConfig
from ..ops.rms_norm import triton as rms_norm
from ..ops.softmax import triton as softmax

Config = LaunchConfig | ColumnConfig
# what a program reads beside rows: a few numbers of its row, or of each of the rows that it sums
BYTES_OF_A_PROGRAM = 64


@dataclass(frozen=True)
class Operands:
    """What the kernels read; what is in it does not matter here."""

    x: Tensor  # [R, D], as are grad and output
    grad: Tensor
    output: Tensor
    weight: Tensor  # [D]
    rstd: Tensor  # [R, 1]

    @classmethod
    def make(cls, rows: int, size: int, dtype: torch.dtype, padding: int) -> Operands:
        """The same every time, rows `padding` elements apart."""
        random = torch.Generator().manual_seed(size)

        def normal(*shape):
            return torch.randn(*shape, generator=random).to(dtype)

        x, grad, output = (normal(rows, size + padding)[:, :size] for _ in range(3))
        return cls(x, grad, output, normal(size), torch.rand(rows, 1, generator=random))


@dataclass(frozen=True)
class RowsKernel:
    """call(operands) launches it once and returns all that it writes; config(D, dtype) is its launch configuration.

    reads(config, D): how many times it may read each element of x, all that it reads taken together.
    streams_out: whether it writes a tensor of their size. by_column: whether it sums over the rows.
    """

    name: str
    call: Callable[[Operands], tuple[Tensor, ...]]
    config: Callable[[int, torch.dtype], Config]
    reads: Callable[[Config, int], float]
    streams_out: bool = True
    by_column: bool = False


@dataclass(frozen=True)
class RowsCase:
    """What cases.Case is for the others."""

    kernel: RowsKernel
    rows: int
    columns: int
    dtype: torch.dtype
    padding: int = 0

    unit = "rows"
    on_tensor_cores = False

    def run(self, *, traps: bool = False) -> tuple[Tensor, ...]:
        """No row is a trap: all are read and written alike."""
        return self.kernel.call(Operands.make(self.rows, self.columns, self.dtype, self.padding))

    @property
    def unit_bytes(self) -> int:
        return self.rows * self.columns * self.dtype.itemsize

    def most_loaded(self, programs: int) -> int:
        beside = 4 * self.config.block if self.kernel.by_column else BYTES_OF_A_PROGRAM
        return int(self.kernel.reads(self.config, self.columns) * self.unit_bytes) + beside * programs

    @property
    def config(self) -> Config:
        return self.kernel.config(self.columns, self.dtype)

    @property
    def size(self) -> str:
        return f"{self.columns:,}"

    @property
    def loads_wide(self) -> bool:
        """Every row begins and ends at a multiple of 128 bits."""
        return all(size * self.dtype.itemsize % 16 == 0 for size in (self.columns, self.padding))

    @property
    def stores_wide(self) -> bool:
        return self.loads_wide and self.kernel.streams_out

    def __str__(self) -> str:
        apart = f", {self.padding} between rows" if self.padding else ""
        sizes = f"{self.rows:,} rows of {self.columns:,}{apart}"
        return f"{self.kernel.name}, {str(self.dtype).removeprefix('torch.')}, {sizes}"


def _twice_less_a_tile(config: LaunchConfig, size: int) -> float:
    return 2 - min(config.tile / size, 1)


def _softmax(operands: Operands, *, log: bool = False, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    return (softmax.forward(operands.x, -1, log, dtype or operands.x.dtype),)


def _softmax_backward(operands: Operands, *, log: bool = False, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    return (softmax.backward(operands.grad, operands.output, -1, log, dtype or operands.x.dtype),)


def _rms_norm(operands: Operands, *, with_weight: bool = True) -> tuple[Tensor, ...]:
    return rms_norm.forward(operands.x, operands.weight if with_weight else None, 1e-6)


def _rms_norm_backward(operands: Operands, *, with_weight: bool = True) -> tuple[Tensor, ...]:
    weight = operands.weight if with_weight else None
    return rms_norm.backward(operands.grad, operands.x, weight, operands.rstd, True, False)[:1]


def _rms_norm_weight(operands: Operands) -> tuple[Tensor, ...]:
    return (rms_norm.weight_partials(operands.x, operands.grad, operands.rstd),)


def _mean_rows(operands: Operands) -> tuple[Tensor, ...]:
    """The first launch of several where a row has more than a block."""
    rows, size = operands.x.shape
    out = torch.empty(rows, -(-size // mean.BLOCK))
    mean.reduce_row_blocks(operands.x[None], out, size)
    return (out,)


def _mean_columns(operands: Operands) -> tuple[Tensor, ...]:
    rows, size = operands.x.shape
    out = torch.empty(-(-rows // mean.columns_config().block), size)
    mean.reduce_column_blocks(operands.x[None, None], out, rows)
    return (out,)


def _of_columns(size: int, dtype: torch.dtype) -> ColumnConfig:
    return mean.columns_config()


KERNELS = (
    RowsKernel("softmax", _softmax, softmax.forward_config, _twice_less_a_tile),
    RowsKernel(
        "softmax_backward",
        _softmax_backward,
        softmax.backward_config,
        lambda config, size: 2 * _twice_less_a_tile(config, size),
    ),
    RowsKernel(
        "rms_norm", _rms_norm, rms_norm.forward_config, lambda config, size: 1 + _twice_less_a_tile(config, size)
    ),
    RowsKernel(
        "rms_norm_backward",
        _rms_norm_backward,
        rms_norm.backward_config,
        lambda config, size: 3 * _twice_less_a_tile(config, size),
    ),
    RowsKernel("mean", _mean_rows, mean.rows_config, lambda config, size: 1, streams_out=False),
)
OVER_COLUMNS = (
    RowsKernel(
        "rms_norm d weight", _rms_norm_weight, _of_columns, lambda config, size: 2, streams_out=False, by_column=True
    ),
    RowsKernel(
        "mean of columns", _mean_columns, _of_columns, lambda config, size: 1, streams_out=False, by_column=True
    ),
)


def _other_branches() -> Iterator[RowsKernel]:
    of_softmax, of_softmax_backward, of_rms_norm, of_rms_norm_backward, _ = KERNELS
    for kernel in (of_softmax, of_softmax_backward):
        yield replace(kernel, name=f"{kernel.name}, logarithm", call=partial(kernel.call, log=True))
    for kernel in (of_rms_norm, of_rms_norm_backward):
        yield replace(kernel, name=f"{kernel.name}, no weight", call=partial(kernel.call, with_weight=False))


def interpreter_cases() -> Iterator[RowsCase]:
    """Rows of one tile, of several, of a size that no tile divides, and rows that lie apart; one block, and several."""
    for kernel in KERNELS:
        yield RowsCase(kernel, 4, 1_000, torch.float32)
        yield RowsCase(kernel, 4, 777, torch.bfloat16, padding=15)
        yield RowsCase(kernel, 2, 20_011, torch.float32)
        yield RowsCase(kernel, 2, 40_000, torch.bfloat16, padding=8)
    for kernel in OVER_COLUMNS:
        yield RowsCase(kernel, 50, 200, torch.float32)
        yield RowsCase(kernel, 2_500, 70, torch.bfloat16, padding=15)


def compile_cases() -> Iterator[RowsCase]:
    """Every launch configuration: rows of one tile at the smallest power of two that has it, or at the odd number
    below, whose rows allow no 128-bit access; rows of many tiles. Then every other branch, once."""
    powers = [2**n for n in range(6, 15)]
    odd = [power - 1 for power in powers]
    for kernel in KERNELS:
        for dtype, one_tile, many_tiles in (
            (torch.bfloat16, powers, 151_936),
            (torch.float32, powers, 151_936),
            (torch.bfloat16, odd, 50_257),
            (torch.float32, [], 50_257),
            (torch.float16, [], 151_936),
        ):
            seen = set()
            for size in one_tile:
                config = kernel.config(size, dtype)
                if size <= config.tile and config not in seen:
                    seen.add(config)
                    yield RowsCase(kernel, 4, size, dtype)
            yield RowsCase(kernel, 4, many_tiles, dtype)
    for kernel in _other_branches():
        yield RowsCase(kernel, 4, 151_936, torch.bfloat16)
    for kernel in OVER_COLUMNS:
        for dtype in (torch.bfloat16, torch.float32):
            yield RowsCase(kernel, 4, 2_048, dtype)
            yield RowsCase(kernel, 4, 2_047, dtype)
        yield RowsCase(kernel, 4, 2_048, torch.float16)
