"""The Triton kernel of matmul and how to call it, once in every layout: those of the cases that are products."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..common.triton.launch import TileConfig
from ..ops.matmul import triton as kernels


@dataclass(frozen=True)
class Sizes:
    rows: int
    columns: int
    depth: int
    batch: int = 3  # products, or groups; 1 where the kernel has one product
    padding: int = 0  # elements between two rows of what may be strided

    def __str__(self) -> str:
        apart = f", {self.padding} between rows" if self.padding else ""
        return f"M = {self.rows}, N = {self.columns}, K = {self.depth}{apart}"


@dataclass(frozen=True)
class Kernel:
    """One layout of the operands. turned: whether the columns of a and the rows of b are what is contiguous."""

    name: str
    a_turned: bool = False
    b_turned: bool = False
    addend: str = ""  # "row" or "matrix"
    batched: bool = False
    grouped: str = ""  # "rows" or "terms"

    def shapes(self, sizes: Sizes) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Of a, b and out."""

        def of(rows, columns, *, is_batched):
            return (sizes.batch, rows, columns) if is_batched else (rows, columns)

        return (
            of(sizes.rows, sizes.depth, is_batched=self.batched),
            of(sizes.depth, sizes.columns, is_batched=self.batched or self.grouped == "rows"),
            of(sizes.rows, sizes.columns, is_batched=self.batched or self.grouped == "terms"),
        )

    def run(self, sizes: Sizes, dtype: torch.dtype, *, traps: bool = False) -> tuple[Tensor]:
        """One launch; with traps, a group is empty, and some rows or terms are of none."""
        random = torch.Generator().manual_seed(sizes.depth)

        def matrix(shape, turned):
            *outer, rows, columns = (*shape[:-2], shape[-1], shape[-2]) if turned else shape
            x = torch.randn(*outer, rows, columns + sizes.padding, generator=random).to(dtype)[..., :columns]
            return x.mT if turned else x

        shape_of_a, shape_of_b, shape_of_out = self.shapes(sizes)
        a, b = matrix(shape_of_a, self.a_turned), matrix(shape_of_b, self.b_turned)
        out = torch.empty(shape_of_out, dtype=dtype)
        if self.grouped:
            kernels.grouped_into(out, a, b, self.ends(sizes, traps=traps), self.grouped)
        elif self.addend:
            addend = matrix(shape_of_out, False) if self.addend == "matrix" else matrix((1, sizes.columns), False)[0]
            kernels.matmul_into(out, a, b, addend=addend, alpha=0.5, beta=2.0)
        else:
            kernels.matmul_into(out, a, b)
        return (out,)

    def ends(self, sizes: Sizes, *, traps: bool = False) -> Tensor:
        size = sizes.rows if self.grouped == "rows" else sizes.depth
        ends = [size * (group + 1) // sizes.batch for group in range(sizes.batch)]
        if traps:
            ends[1], ends[-1] = ends[0], size - 1
        return torch.tensor(ends, dtype=torch.int32)


@dataclass(frozen=True)
class MatmulCase:
    """What cases.Case is for the others."""

    kernel: Kernel
    sizes: Sizes
    dtype: torch.dtype

    unit = "output"

    def run(self, *, traps: bool = False) -> tuple[Tensor]:
        return self.kernel.run(self.sizes, self.dtype, traps=traps)

    @property
    def unit_bytes(self) -> int:
        return self.sizes.rows * self.sizes.columns * self.dtype.itemsize

    def most_loaded(self, programs: int) -> int:
        """Each row once for every tile of columns, each column once for every tile of rows; groups as many times as
        there are programs."""
        sizes, kernel, tile = self.sizes, self.kernel, self.config
        of_rows = [(sizes.rows, sizes.depth)] * (sizes.batch if kernel.batched else 1)
        if kernel.grouped:
            counts = kernel.ends(sizes).diff(prepend=torch.zeros(1, dtype=torch.int32)).tolist()
            of_rows = [(n, sizes.depth) if kernel.grouped == "rows" else (sizes.rows, n) for n in counts]
        elements = 0
        for rows, depth in of_rows:
            down, across = -(-rows // tile.rows), -(-sizes.columns // tile.columns)
            elements += depth * (rows * across + sizes.columns * down) + bool(kernel.addend) * rows * sizes.columns
        return elements * self.dtype.itemsize + bool(kernel.grouped) * programs * 4 * (sizes.batch + 2)

    @property
    def config(self) -> TileConfig:
        return kernels.tile_config(self.sizes.columns, self.dtype)

    @property
    def size(self) -> str:
        return f"{self.sizes.columns} × {self.sizes.depth}"

    @property
    def loads_wide(self) -> bool:
        sizes = (self.sizes.rows, self.sizes.columns, self.sizes.depth, self.sizes.padding)
        return all(size * self.dtype.itemsize % 16 == 0 for size in sizes)

    @property
    def stores_wide(self) -> bool:
        return False

    @property
    def on_tensor_cores(self) -> bool:
        return self.dtype.itemsize == 2

    def __str__(self) -> str:
        return f"{self.kernel.name}, {str(self.dtype).removeprefix('torch.')}, {self.sizes}"


PLAIN = Kernel("matmul")
LAYOUTS = (
    PLAIN,
    Kernel("matmul, linear", b_turned=True, addend="row"),
    Kernel("matmul, d weight", a_turned=True),
    Kernel("matmul, both turned", a_turned=True, b_turned=True),
)
MANY = (
    Kernel("matmul, batched, with addend", batched=True, addend="matrix"),
    Kernel("matmul, groups of rows", grouped="rows", b_turned=True),
    Kernel("matmul, groups of terms", grouped="terms", a_turned=True),
)


def interpreter_cases() -> Iterator[MatmulCase]:
    """One tile of everything; several, in sizes that none divides; rows that lie apart."""
    for kernel in (*LAYOUTS, *MANY):
        yield MatmulCase(kernel, Sizes(16, 24, 32), torch.float32)
        yield MatmulCase(kernel, Sizes(137, 131, 67, padding=3), torch.bfloat16)
        yield MatmulCase(kernel, Sizes(144, 136, 72, padding=8), torch.float16)


def compile_cases() -> Iterator[MatmulCase]:
    """Tiles of either width; the code depends on the sizes by whether all are whole numbers of 128-bit accesses, and on
    the number of groups by its power of two alone."""
    whole, odd = Sizes(64, 256, 128, batch=8), Sizes(63, 255, 127, batch=8)
    for kernel in (*LAYOUTS, *MANY):
        for dtype in (torch.bfloat16, torch.float32):
            yield MatmulCase(kernel, whole, dtype)
        yield MatmulCase(kernel, odd, torch.bfloat16)
        yield MatmulCase(kernel, replace(whole, columns=kernels.WIDE), torch.bfloat16)
    yield MatmulCase(PLAIN, odd, torch.float32)
    yield MatmulCase(PLAIN, replace(odd, columns=kernels.WIDE + 1), torch.bfloat16)
    yield MatmulCase(PLAIN, whole, torch.float16)
