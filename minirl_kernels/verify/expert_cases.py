"""The Triton kernels of moe_experts and how to call them, one at a time: those of the cases that have pairs of a token
and an expert where the others have rows of logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..common.triton.launch import LaunchConfig, TileConfig
from ..ops.moe_experts import kernels, triton
from ..ops.moe_experts.kernels import Rows


@dataclass(frozen=True)
class Sizes:
    tokens: int
    top_k: int
    num_experts: int
    hidden_size: int
    intermediate_size: int
    padding: int = 0  # elements between two rows of what may be strided

    @property
    def pairs(self) -> int:
        return self.tokens * self.top_k

    def __str__(self) -> str:
        apart = f", {self.padding} between rows" if self.padding else ""
        experts = f"{self.tokens} tokens to {self.top_k} of {self.num_experts} experts"
        return f"{experts}, H = {self.hidden_size}, I = {self.intermediate_size}{apart}"


@dataclass(frozen=True)
class Operands:
    """What the kernels read; what is in it does not matter here."""

    hidden: Tensor  # [T, H]
    grad_out: Tensor  # [T, H]
    weights: Tensor  # [T, K]
    gate_up_proj: Tensor  # [E, 2 I, H]
    down_proj: Tensor  # [E, H, I]
    gate_up: Tensor  # [T K, 2 I]
    activation: Tensor  # [T K, I]
    rows: Rows

    @classmethod
    def make(cls, sizes: Sizes, dtype: torch.dtype, *, traps: bool = False) -> Operands:
        """The same every time; with traps, an expert without tokens, and two pairs without an expert."""
        random = torch.Generator().manual_seed(sizes.hidden_size)

        def normal(*shape):
            return torch.randn(*shape, generator=random).to(dtype)

        def strided(*shape):
            return normal(*shape[:-1], shape[-1] + sizes.padding)[..., : shape[-1]]

        tokens, width, hidden_size = sizes.tokens, sizes.intermediate_size, sizes.hidden_size
        experts = torch.rand(tokens, sizes.num_experts, generator=random).argsort(-1)[:, : sizes.top_k]
        if traps:
            experts[experts == 1] = 0
            experts[2, 0], experts[tokens - 1, -1] = -1, sizes.num_experts
        return cls(
            hidden=strided(tokens, hidden_size),
            grad_out=normal(tokens, hidden_size),
            weights=torch.rand(tokens, sizes.top_k, generator=random),
            gate_up_proj=strided(sizes.num_experts, 2 * width, hidden_size),
            down_proj=strided(sizes.num_experts, hidden_size, width),
            gate_up=normal(sizes.pairs, 2 * width),
            activation=normal(sizes.pairs, width),
            rows=triton.sorted_rows(experts, sizes.num_experts),
        )

    def with_expert(self, by_row: Tensor) -> Tensor:
        """The rows that have one; the others are not written."""
        return by_row[: self.rows.begins[-2]]


Config = TileConfig | LaunchConfig
PARTS = 5  # of I, for d weights


@dataclass(frozen=True)
class ExpertsKernel:
    """call(operands) launches it once and returns all that it writes; config(sizes, dtype) is its launch configuration.

    loads(sizes, config, blocks, bytes of an element): the bytes that it loads beside begins; the rows fill `blocks`.
    """

    name: str
    call: Callable[[Operands], tuple[Tensor, ...]]
    config: Callable[[Sizes, torch.dtype], Config]
    loads: Callable[[Sizes, Config, int, int], int]
    multiplies: bool = True


@dataclass(frozen=True)
class ExpertsCase:
    """What cases.Case is for the others."""

    kernel: ExpertsKernel
    sizes: Sizes
    dtype: torch.dtype

    unit = "hidden states"

    def run(self, *, traps: bool = False) -> tuple[Tensor, ...]:
        return self.kernel.call(Operands.make(self.sizes, self.dtype, traps=traps))

    @property
    def unit_bytes(self) -> int:
        return self.sizes.tokens * self.sizes.hidden_size * self.dtype.itemsize

    def most_loaded(self, programs: int) -> int:
        blocks = 0
        if isinstance(self.config, TileConfig):
            begins = Operands.make(self.sizes, self.dtype).rows.begins
            blocks = sum(_tiles(rows, self.config.rows) for rows in begins.diff().tolist())
        of_begins = programs * 8 * (self.sizes.num_experts + 3)
        return self.kernel.loads(self.sizes, self.config, blocks, self.dtype.itemsize) + of_begins

    @property
    def config(self) -> Config:
        return self.kernel.config(self.sizes, self.dtype)

    @property
    def size(self) -> str:
        return f"{self.sizes.hidden_size} × {self.sizes.intermediate_size}"

    @property
    def loads_wide(self) -> bool:
        sizes = (self.sizes.hidden_size, self.sizes.intermediate_size, self.sizes.padding)
        return all(size * self.dtype.itemsize % 16 == 0 for size in sizes)

    @property
    def stores_wide(self) -> bool:
        return self.loads_wide and not self.kernel.multiplies

    @property
    def on_tensor_cores(self) -> bool:
        return self.kernel.multiplies and self.dtype.itemsize == 2

    def __str__(self) -> str:
        return f"{self.kernel.name}, {str(self.dtype).removeprefix('torch.')}, {self.sizes}"


def _tiles(size: int, tile: int) -> int:
    return -(-size // tile)


def _up(operands: Operands, *, for_backward: bool = True) -> tuple[Tensor, ...]:
    activation = torch.empty_like(operands.activation)
    gate_up = torch.empty_like(operands.gate_up) if for_backward else None
    kernels.up(operands.hidden, operands.gate_up_proj, operands.rows, activation, gate_up)
    return tuple(operands.with_expert(out) for out in (activation, gate_up) if out is not None)


def _product(operands: Operands, *, transposed: bool) -> tuple[Tensor, ...]:
    x, matrix = (operands.gate_up, operands.gate_up_proj) if transposed else (operands.activation, operands.down_proj)
    y = operands.weights.new_empty(len(x), operands.hidden.shape[1])
    kernels.product(x, matrix, operands.rows, y, transposed=transposed)
    return (y,)


def _activation_grad(
    operands: Operands, *, gate_up_grad: bool = True, weighted: bool = True, parts: bool = True
) -> tuple[Tensor, ...]:
    gate_up, width = operands.gate_up, operands.activation.shape[1]
    out = (
        torch.empty_like(gate_up) if gate_up_grad else None,
        torch.empty_like(operands.activation) if weighted else None,
        operands.weights.new_empty(len(gate_up), kernels.weight_parts(width, gate_up.dtype)) if parts else None,
    )
    shared = (operands.grad_out, operands.down_proj, gate_up, operands.weights, operands.rows)
    kernels.activation_grad(*shared, *out)
    by_row = tuple(operands.with_expert(values) for values in out[:2] if values is not None)
    return (*by_row, out[2]) if parts else by_row


def _weight_grad(operands: Operands, *, of_down: bool) -> tuple[Tensor, ...]:
    left, right = (operands.grad_out, operands.activation) if of_down else (operands.gate_up, operands.hidden)
    out = left.new_empty(operands.rows.num_experts, left.shape[1], right.shape[1])
    kernels.weight_grad(left, right, operands.rows, out, left_by_token=of_down)
    return (out,)


def _combine(operands: Operands, *, weights: bool = True) -> tuple[Tensor, ...]:
    y = torch.ones(*operands.weights.shape, operands.hidden.shape[1])
    out = torch.empty_like(operands.grad_out)
    kernels.combine(y, operands.weights if weights else None, out)
    return (out,)


def _sum_of_parts(operands: Operands) -> tuple[Tensor, ...]:
    """The combine as the gradient of the weights has it: a pair where it has tokens."""
    parts = torch.ones(len(operands.gate_up), PARTS, 1)
    out = torch.empty_like(parts[:, 0])
    kernels.combine(parts, None, out)
    return (out,)


def _loads_over_rows(of_row, of_matrix, columns, *, beside=0):
    """Each row and its pair once for every tile of columns, each expert's matrix once for every block of its rows; all
    in elements, as functions of (H, I)."""

    def loads(sizes, config, blocks, item):
        h, i = sizes.hidden_size, sizes.intermediate_size
        tiles = _tiles(columns(h, i), config.columns)
        return tiles * sizes.pairs * (of_row(h, i) * item + 8 + beside) + blocks * of_matrix(h, i) * item

    return loads


def _loads_of_activation_grad(sizes, config, blocks, item):
    of_gate_up = 2 * sizes.pairs * sizes.intermediate_size * item
    over_rows = _loads_over_rows(lambda h, i: h, lambda h, i: h * i, lambda h, i: i, beside=4)
    return over_rows(sizes, config, blocks, item) + of_gate_up


def _loads_of_weight_grad(height, width):
    """Either operand once for every tile of the other, the pairs once for every tile of both."""

    def loads(sizes, config, blocks, item):
        m, n = (size(sizes.hidden_size, sizes.intermediate_size) for size in (height, width))
        down, across = _tiles(m, config.rows), _tiles(n, config.columns)
        return sizes.pairs * ((across * m + down * n) * item + 8 * down * across)

    return loads


def _loads_of_combine(sizes, config, blocks, item):
    return 4 * sizes.pairs * (sizes.hidden_size + _tiles(sizes.hidden_size, config.tile))


def _of_products(sizes: Sizes, dtype: torch.dtype) -> TileConfig:
    return kernels.product_config(dtype)


KERNELS = (
    ExpertsKernel(
        "moe_experts up",
        _up,
        lambda sizes, dtype: kernels.halved_config(dtype),
        _loads_over_rows(lambda h, i: h, lambda h, i: 2 * i * h, lambda h, i: i),
    ),
    ExpertsKernel(
        "moe_experts down",
        partial(_product, transposed=False),
        _of_products,
        _loads_over_rows(lambda h, i: i, lambda h, i: h * i, lambda h, i: h),
    ),
    ExpertsKernel(
        "moe_experts d hidden",
        partial(_product, transposed=True),
        _of_products,
        _loads_over_rows(lambda h, i: 2 * i, lambda h, i: 2 * i * h, lambda h, i: h),
    ),
    ExpertsKernel(
        "moe_experts d activation",
        _activation_grad,
        lambda sizes, dtype: kernels.halved_config(dtype),
        _loads_of_activation_grad,
    ),
    ExpertsKernel(
        "moe_experts d gate_up_proj",
        partial(_weight_grad, of_down=False),
        lambda sizes, dtype: kernels.weight_grad_config(dtype),
        _loads_of_weight_grad(lambda h, i: 2 * i, lambda h, i: h),
    ),
    ExpertsKernel(
        "moe_experts d down_proj",
        partial(_weight_grad, of_down=True),
        lambda sizes, dtype: kernels.weight_grad_config(dtype),
        _loads_of_weight_grad(lambda h, i: h, lambda h, i: i),
    ),
    ExpertsKernel(
        "moe_experts combine",
        _combine,
        lambda sizes, dtype: kernels.combine_config(sizes.hidden_size, dtype),
        _loads_of_combine,
        multiplies=False,
    ),
)


# the gradient of the weights sums over parts as a combine does over a token's pairs
SUM_OF_PARTS = ExpertsKernel(
    "moe_experts combine, d weights",
    _sum_of_parts,
    lambda sizes, dtype: kernels.combine_config(1, dtype),
    lambda sizes, config, blocks, item: 4 * PARTS * sizes.pairs,
    multiplies=False,
)


def _other_branches() -> Iterator[ExpertsKernel]:
    up, _, _, activation_grad, *_, combine = KERNELS
    yield replace(up, name=f"{up.name}, nothing kept", call=partial(_up, for_backward=False))
    names = ("gate_up_grad", "weighted", "parts")
    for only in names:
        call = partial(_activation_grad, **{name: name == only for name in names})
        multiplies = only != "weighted"
        yield replace(activation_grad, name=f"{activation_grad.name}, {only} alone", call=call, multiplies=multiplies)
    yield replace(combine, name=f"{combine.name}, no weights", call=partial(_combine, weights=False))


def interpreter_cases() -> Iterator[ExpertsCase]:
    """One tile of everything; several, in sizes that none divides; rows that lie apart."""
    for kernel in KERNELS:
        yield ExpertsCase(kernel, Sizes(9, 2, 3, 32, 16), torch.float32)
        yield ExpertsCase(kernel, Sizes(45, 3, 4, 137, 131, padding=3), torch.bfloat16)
        yield ExpertsCase(kernel, Sizes(100, 2, 2, 144, 136, padding=8), torch.float16)


def compile_cases() -> Iterator[ExpertsCase]:
    """The code depends on H and I by whether a row is a whole number of 128-bit accesses, and on E by its power of
    two alone."""
    whole, odd = Sizes(16, 8, 128, 256, 128), Sizes(16, 8, 128, 255, 127)
    for kernel in KERNELS:
        for dtype in (torch.bfloat16, torch.float32):
            yield ExpertsCase(kernel, whole, dtype)
            yield ExpertsCase(kernel, odd, dtype)
        yield ExpertsCase(kernel, whole, torch.float16)
    for kernel in _other_branches():
        yield ExpertsCase(kernel, whole, torch.bfloat16)
    yield ExpertsCase(SUM_OF_PARTS, odd, torch.float32)
