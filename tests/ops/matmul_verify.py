"""Cases of the kernel of matmul, in every layout of its operands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from verify.case import Case, allow_wide_accesses, blocks, gap
from verify.launches import captured, on_gpu, tile_of

from minirl_kernels.common.triton.config import TileConfig
from minirl_kernels.ops.matmul import triton


@dataclass(frozen=True)
class Sizes:
    rows: int
    columns: int
    depth: int
    batch: int = 3  # products of a batched layout, or groups
    padding: int = 0  # elements between two rows of a tensor that may be strided

    def __str__(self) -> str:
        return f"M = {self.rows}, N = {self.columns}, K = {self.depth}{gap(self.padding)}"


@dataclass(frozen=True)
class Operands:
    """Arguments of one launch. The checks do not look at their values."""

    out: Tensor
    a: Tensor
    b: Tensor
    addend: Tensor | None
    ends: Tensor | None  # of the groups


@dataclass(frozen=True)
class Layout:
    """One layout of the operands. turned: whether columns of a, or rows of b, are contiguous."""

    name: str
    a_turned: bool = False
    b_turned: bool = False
    addend: str = ""  # "row" or "matrix"
    batched: bool = False
    grouped: str = ""  # "rows" or "terms"
    gpu: str = ""  # of the launch, if the check does not name one

    def operands(self, sizes: Sizes, dtype: torch.dtype, *, traps: bool = False) -> Operands:
        """Traps are an empty group, and rows or terms that belong to no group."""
        random = torch.Generator().manual_seed(sizes.depth)

        def matrix(rows, columns, *, is_batched=False, turned=False):
            shape = (columns, rows) if turned else (rows, columns)
            shape = (sizes.batch, *shape) if is_batched else shape
            x = torch.randn(*shape[:-1], shape[-1] + sizes.padding, generator=random).to(dtype)[..., : shape[-1]]
            return x.mT if turned else x

        m, n, k = sizes.rows, sizes.columns, sizes.depth
        a = matrix(m, k, is_batched=self.batched, turned=self.a_turned)
        b = matrix(k, n, is_batched=self.batched or self.grouped == "rows", turned=self.b_turned)
        out_is_batched = self.batched or self.grouped == "terms"
        addend = None
        if self.addend:
            addend = matrix(m, n, is_batched=out_is_batched) if self.addend == "matrix" else matrix(1, n)[0]
        return Operands(
            out=torch.empty((sizes.batch, m, n) if out_is_batched else (m, n), dtype=dtype),
            a=a,
            b=b,
            addend=addend,
            ends=self.ends(sizes, traps=traps) if self.grouped else None,
        )

    def ends(self, sizes: Sizes, *, traps: bool = False) -> Tensor:
        size = sizes.rows if self.grouped == "rows" else sizes.depth
        ends = [size * (group + 1) // sizes.batch for group in range(sizes.batch)]
        if traps:
            ends[1], ends[-1] = ends[0], size - 1
        return torch.tensor(ends, dtype=torch.int32)

    def launch(self, operands: Operands) -> tuple[Tensor, ...]:
        with on_gpu(self.gpu) if self.gpu else nullcontext():
            return self._launch(operands)

    def _launch(self, operands: Operands) -> tuple[Tensor, ...]:
        out, a, b = operands.out, operands.a, operands.b
        if self.grouped:
            triton.grouped_into(out, a, b, operands.ends, self.grouped)
        elif self.addend:
            triton.matmul_into(out, a, b, addend=operands.addend, alpha=0.5, beta=2.0)
        else:
            triton.matmul_into(out, a, b)
        return (out,)

    def config(self, sizes: Sizes, dtype: torch.dtype) -> TileConfig:
        """The tile that the launcher chooses, for the GPU that it is told of."""
        with captured() as launches:
            self.launch(self.operands(sizes, dtype))
        return tile_of(launches[0])

    def most_loaded(self, sizes: Sizes, dtype: torch.dtype, programs: int) -> int:
        """A row once for every tile of columns, a column once for every tile of rows, the ends once for a program."""
        tile = self.config(sizes, dtype)
        products = [(sizes.rows, sizes.depth)] * (sizes.batch if self.batched else 1)
        if self.grouped:
            counts = self.ends(sizes).diff(prepend=torch.zeros(1, dtype=torch.int32)).tolist()
            products = [(n, sizes.depth) if self.grouped == "rows" else (sizes.rows, n) for n in counts]
        elements = 0
        for rows, depth in products:
            down, across = blocks(rows, tile.rows), blocks(sizes.columns, tile.columns)
            elements += depth * (rows * across + sizes.columns * down) + bool(self.addend) * rows * sizes.columns
        return elements * dtype.itemsize + bool(self.grouped) * programs * 4 * (sizes.batch + 2)

    def case(self, sizes: Sizes, dtype: torch.dtype) -> Case:
        return Case(
            name=self.name,
            dtype=dtype,
            size=f"{sizes.rows} × {sizes.columns} × {sizes.depth}",
            sizes=str(sizes),
            operands=partial(self.operands, sizes, dtype),
            launch=self.launch,
            config=partial(self.config, sizes, dtype),
            most_loaded=partial(self.most_loaded, sizes, dtype),
            unit="output",
            unit_bytes=sizes.rows * sizes.columns * dtype.itemsize,
            loads_wide=allow_wide_accesses(dtype, sizes.rows, sizes.columns, sizes.depth, sizes.padding),
            on_tensor_cores=dtype.itemsize == 2,
            alike=partial(self.alike, sizes, dtype),
        )

    def alike(self, sizes: Sizes, dtype: torch.dtype) -> Iterator[Case]:
        """Other strides, and other numbers of rows and columns in the same tile."""
        for padding in (3, 64):
            yield self.case(replace(sizes, padding=padding), dtype)
        yield self.case(replace(sizes, rows=sizes.rows - 1), dtype)
        yield self.case(replace(sizes, columns=sizes.columns + 8), dtype)
        yield self.case(replace(sizes, columns=sizes.columns + 9), dtype)


PLAIN = Layout("matmul")
LAYOUTS = (
    PLAIN,
    Layout("matmul, linear", b_turned=True, addend="row"),
    Layout("matmul, d weight", a_turned=True),
    Layout("matmul, both turned", a_turned=True, b_turned=True),
)
MANY = (
    Layout("matmul, batched, with addend", batched=True, addend="matrix"),
    Layout("matmul, groups of rows", grouped="rows", b_turned=True),
    Layout("matmul, groups of terms", grouped="terms", a_turned=True),
)


def interpreter_cases() -> Iterator[Case]:
    """One tile of each size; several tiles, in sizes that no tile divides; rows with a gap between them."""
    for layout in (*LAYOUTS, *MANY):
        yield layout.case(Sizes(16, 24, 32), torch.float32)
        yield layout.case(Sizes(137, 131, 67, padding=3), torch.bfloat16)
        yield layout.case(Sizes(144, 136, 72, padding=8), torch.float16)
    plain, by_rows = (
        replace(layout, name=f"{layout.name}, tiles of sm_90", gpu="sm_90") for layout in (PLAIN, MANY[1])
    )
    yield plain.case(Sizes(13, 40, 264, padding=8), torch.float16)
    yield plain.case(Sizes(72, 72, 136), torch.float16)
    yield by_rows.case(Sizes(45, 40, 264), torch.float16)


def compile_cases() -> Iterator[Case]:
    """The tiles of few and many columns. On sm_90 they are the tiles of few, some and many rows.

    The code depends on whether all sizes are whole numbers of 128-bit accesses, and on the power of two of the number
    of groups. It depends on no other property of the sizes.
    """
    whole, odd = Sizes(64, 256, 128, batch=8), Sizes(63, 255, 127, batch=8)
    for layout in (*LAYOUTS, *MANY):
        for dtype in (torch.bfloat16, torch.float32):
            yield layout.case(whole, dtype)
        yield layout.case(odd, torch.bfloat16)
        yield layout.case(replace(whole, columns=triton.WIDE), torch.bfloat16)
        yield layout.case(replace(whole, rows=16), torch.bfloat16)
        yield layout.case(replace(whole, rows=4096, columns=1024), torch.bfloat16)
    yield PLAIN.case(odd, torch.float32)
    yield PLAIN.case(replace(whole, rows=16), torch.float32)
    yield PLAIN.case(replace(odd, columns=triton.WIDE + 1), torch.bfloat16)
    yield PLAIN.case(replace(whole, rows=1536, columns=1024), torch.bfloat16)
    yield PLAIN.case(whole, torch.float16)
    yield PLAIN.case(replace(whole, rows=4096, columns=1024), torch.float16)
