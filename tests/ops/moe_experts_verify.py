"""Cases of the kernels of moe_experts. A row is a pair of a token and an expert."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from verify.case import Case, allow_wide_accesses, blocks, gap
from verify.launches import captured, on_gpu, tile_of

from minirl_kernels.common.triton.config import LaunchConfig, TileConfig
from minirl_kernels.ops.moe_experts import kernels
from minirl_kernels.ops.moe_experts.kernels import Rows
from minirl_kernels.ops.moe_experts.kernels_combine import combine, combine_config
from minirl_kernels.ops.moe_experts.kernels_sort import sort_config, sorted_rows
from minirl_kernels.ops.moe_experts.kernels_tiles import weight_parts


@dataclass(frozen=True)
class Sizes:
    tokens: int
    top_k: int
    num_experts: int
    hidden_size: int
    intermediate_size: int
    padding: int = 0  # elements between two rows of a tensor that may be strided

    @property
    def pairs(self) -> int:
        return self.tokens * self.top_k

    def __str__(self) -> str:
        experts = f"{self.tokens} tokens to {self.top_k} of {self.num_experts} experts"
        return f"{experts}, H = {self.hidden_size}, I = {self.intermediate_size}{gap(self.padding)}"


@dataclass(frozen=True)
class Operands:
    """All inputs of the kernels. The checks do not look at their values."""

    hidden: Tensor  # [T, H]
    grad_out: Tensor  # [T, H]
    weights: Tensor  # [T, K]
    gate_up_proj: Tensor  # [E, 2 I, H]
    down_proj: Tensor  # [E, H, I]
    gate_up: Tensor  # [T K, 2 I]
    activation: Tensor  # [T K, I]
    experts: Tensor  # [T, K]
    rows: Rows

    @classmethod
    def make(cls, sizes: Sizes, dtype: torch.dtype, *, traps: bool = False) -> Operands:
        """Traps are an expert without tokens, and two pairs without an expert."""
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
            experts=experts.contiguous(),
            rows=by_torch(experts, sizes.num_experts),
        )

    def with_expert(self, by_row: Tensor) -> Tensor:
        """The rows that have an expert; the kernels write no others."""
        return by_row[: self.rows.begins[-2]]


def by_torch(experts: Tensor, num_experts: int) -> Rows:
    """The result of sorted_rows, without a launch."""
    ids = experts.flatten().long()
    ids, pairs = ids.where((ids >= 0) & (ids < num_experts), num_experts).sort(stable=True)
    return Rows(pairs, torch.searchsorted(ids, torch.arange(num_experts + 2)), experts.shape[1])


Config = TileConfig | LaunchConfig
PARTS = 5  # parts of I, over which the gradient of the weights is summed


@dataclass(frozen=True)
class Kernel:
    """A kernel with one set of options: launch(operands) as Case has it.

    loads(sizes, config, row_blocks, bytes of an element): the bytes that it loads, without the begins of the experts.
    The rows of all experts fill row_blocks blocks.
    """

    name: str
    launch: Callable[[Operands], tuple[Tensor, ...]]
    loads: Callable[[Sizes, Config, int, int], int]
    multiplies: bool = True
    gpu: str = ""  # of the launch, if the check does not name one

    def run(self, operands: Operands) -> tuple[Tensor, ...]:
        with on_gpu(self.gpu) if self.gpu else nullcontext():
            return self.launch(operands)

    def config(self, sizes: Sizes, dtype: torch.dtype) -> Config:
        """The configuration that the launcher chooses, for the GPU that it is told of."""
        with captured() as launches:
            self.run(Operands.make(sizes, dtype))
        has_tile = "BLOCK_M" in launches[0].kwargs
        return tile_of(launches[0]) if has_tile else combine_config(sizes.hidden_size, dtype)

    def case(self, sizes: Sizes, dtype: torch.dtype) -> Case:
        config = partial(self.config, sizes, dtype)

        def most_loaded(programs):
            row_blocks = 0
            if isinstance(config(), TileConfig):
                begins = Operands.make(sizes, dtype).rows.begins
                row_blocks = sum(blocks(rows, config().rows) for rows in begins.diff().tolist())
            begins_of_experts = programs * 8 * (sizes.num_experts + 3)
            return self.loads(sizes, config(), row_blocks, dtype.itemsize) + begins_of_experts

        is_aligned = allow_wide_accesses(dtype, sizes.hidden_size, sizes.intermediate_size, sizes.padding)
        return Case(
            name=self.name,
            dtype=dtype,
            size=f"{sizes.hidden_size} × {sizes.intermediate_size}",
            sizes=str(sizes),
            operands=partial(Operands.make, sizes, dtype),
            launch=self.run,
            config=config,
            most_loaded=most_loaded,
            unit="hidden states",
            unit_bytes=sizes.tokens * sizes.hidden_size * dtype.itemsize,
            loads_wide=is_aligned,
            stores_wide=is_aligned and not self.multiplies,
            on_tensor_cores=self.multiplies and dtype.itemsize == 2,
            alike=lambda: [self.case(replace(sizes, padding=padding), dtype) for padding in (3, 64)],
        )


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
    gate_up = operands.gate_up
    out = (
        torch.empty_like(gate_up) if gate_up_grad else None,
        torch.empty_like(operands.activation) if weighted else None,
        operands.weights.new_empty(len(gate_up), weight_parts(operands.down_proj)) if parts else None,
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
    combine(y, operands.weights if weights else None, out)
    return (out,)


def _combine_gradients(operands: Operands, *, of_hidden: bool) -> tuple[Tensor, ...]:
    """The combine kernel of the backward. Without the gradient of hidden, it sums that of the weights alone."""
    parts = torch.ones(*operands.weights.shape, PARTS)
    weights_grad = torch.empty_like(operands.weights)
    if not of_hidden:
        combine(None, None, None, parts, weights_grad)
        return (weights_grad,)
    y = torch.ones(*operands.weights.shape, operands.hidden.shape[1])
    out = torch.empty_like(operands.grad_out)
    combine(y, None, out, parts, weights_grad)
    return out, weights_grad


def _loads_over_rows(row_size, matrix_size, columns, *, beside=0):
    """A row and its pair once for every tile of columns, an expert's matrix once for every block of the expert's rows.

    row_size, matrix_size and columns are functions of (H, I) that count elements.
    """

    def loads(sizes, config, row_blocks, item):
        h, i = sizes.hidden_size, sizes.intermediate_size
        tiles = blocks(columns(h, i), config.columns)
        return tiles * sizes.pairs * (row_size(h, i) * item + 8 + beside) + row_blocks * matrix_size(h, i) * item

    return loads


def _loads_of_activation_grad(sizes, config, row_blocks, item):
    gate_up = 2 * sizes.pairs * sizes.intermediate_size * item
    over_rows = _loads_over_rows(lambda h, i: h, lambda h, i: h * i, lambda h, i: i, beside=4)
    return over_rows(sizes, config, row_blocks, item) + gate_up


def _loads_of_weight_grad(height, width):
    """Each operand once for every tile of the other operand, the pairs once for every tile of the product."""

    def loads(sizes, config, row_blocks, item):
        m, n = (size(sizes.hidden_size, sizes.intermediate_size) for size in (height, width))
        down, across = blocks(m, config.rows), blocks(n, config.columns)
        return sizes.pairs * ((across * m + down * n) * item + 8 * down * across)

    return loads


def _loads_of_combine(sizes, config, row_blocks, item):
    return 4 * sizes.pairs * (sizes.hidden_size + blocks(sizes.hidden_size, config.tile))


KERNELS = (
    Kernel(
        "moe_experts up",
        _up,
        _loads_over_rows(lambda h, i: h, lambda h, i: 2 * i * h, lambda h, i: i),
    ),
    Kernel(
        "moe_experts down",
        partial(_product, transposed=False),
        _loads_over_rows(lambda h, i: i, lambda h, i: h * i, lambda h, i: h),
    ),
    Kernel(
        "moe_experts d hidden",
        partial(_product, transposed=True),
        _loads_over_rows(lambda h, i: 2 * i, lambda h, i: 2 * i * h, lambda h, i: h),
    ),
    Kernel(
        "moe_experts d activation",
        _activation_grad,
        _loads_of_activation_grad,
    ),
    Kernel(
        "moe_experts d gate_up_proj",
        partial(_weight_grad, of_down=False),
        _loads_of_weight_grad(lambda h, i: 2 * i, lambda h, i: h),
    ),
    Kernel(
        "moe_experts d down_proj",
        partial(_weight_grad, of_down=True),
        _loads_of_weight_grad(lambda h, i: h, lambda h, i: i),
    ),
    Kernel(
        "moe_experts combine",
        _combine,
        _loads_of_combine,
        multiplies=False,
    ),
)


COMBINE_GRADIENTS = Kernel(
    "moe_experts combine, gradients",
    partial(_combine_gradients, of_hidden=True),
    lambda sizes, config, row_blocks, item: 4 * sizes.pairs * (sizes.hidden_size + PARTS),
    multiplies=False,
)


def _sort(operands: Operands) -> tuple[Tensor, ...]:
    rows = sorted_rows(operands.experts, operands.rows.num_experts)
    return rows.pairs, rows.begins


def _sort_case(sizes: Sizes, experts_dtype: torch.dtype) -> Case:
    """A program loads all ids once, and those of its segment once more."""

    def operands(traps=False):
        made = Operands.make(replace(sizes, hidden_size=1, intermediate_size=1), torch.float32, traps=traps)
        return replace(made, experts=made.experts.to(experts_dtype))

    return Case(
        name="moe_experts sort",
        dtype=experts_dtype,
        size=f"{sizes.num_experts}",
        sizes=f"{sizes.tokens} tokens to {sizes.top_k} of {sizes.num_experts} experts",
        operands=operands,
        launch=_sort,
        config=sort_config,
        most_loaded=lambda programs: programs * 2 * sizes.pairs * experts_dtype.itemsize,
        unit="ids",
        unit_bytes=sizes.pairs * experts_dtype.itemsize,
    )


def _other_branches() -> Iterator[Kernel]:
    """The options that compile further branches of the kernels than KERNELS does."""
    up, _, _, activation_grad, *_, combine = KERNELS
    yield replace(up, name=f"{up.name}, nothing kept", launch=partial(_up, for_backward=False))
    names = ("gate_up_grad", "weighted", "parts")
    for only in names:
        yield replace(
            activation_grad,
            name=f"{activation_grad.name}, {only} alone",
            launch=partial(_activation_grad, **{name: name == only for name in names}),
            multiplies=only != "weighted",
        )
    yield replace(combine, name=f"{combine.name}, no weights", launch=partial(_combine, weights=False))


def interpreter_cases() -> Iterator[Case]:
    """One tile of each size; several tiles, in sizes that no tile divides; rows with a gap between them."""
    for kernel in KERNELS:
        yield kernel.case(Sizes(9, 2, 3, 32, 16), torch.float32)
        yield kernel.case(Sizes(45, 3, 4, 137, 131, padding=3), torch.bfloat16)
        yield kernel.case(Sizes(100, 2, 2, 144, 136, padding=8), torch.float16)
    for kernel in (KERNELS[0], KERNELS[1], KERNELS[3]):
        yield replace(kernel, gpu="sm_90").case(Sizes(70, 2, 2, 144, 136, padding=8), torch.float16)
    yield COMBINE_GRADIENTS.case(Sizes(45, 3, 4, 2500, 131), torch.bfloat16)
    yield _sort_case(Sizes(45, 3, 4, 1, 1), torch.int64)
    yield _sort_case(Sizes(1500, 6, 9, 1, 1), torch.int32)


def compile_cases() -> Iterator[Case]:
    """The code depends on whether a row is a whole number of 128-bit accesses, and on the power of two of E.

    It depends on no other property of H, I and E. On sm_90 an expert with many rows has larger tiles.
    """
    whole, odd = Sizes(16, 8, 128, 256, 128), Sizes(16, 8, 128, 255, 127)
    for kernel in KERNELS[:3]:
        for dtype in (torch.bfloat16, torch.float16):
            yield kernel.case(replace(whole, tokens=1024), dtype)
    for kernel in KERNELS:
        for dtype in (torch.bfloat16, torch.float32):
            yield kernel.case(whole, dtype)
            yield kernel.case(odd, dtype)
        yield kernel.case(whole, torch.float16)
    for kernel in _other_branches():
        yield kernel.case(whole, torch.bfloat16)
    yield COMBINE_GRADIENTS.case(whole, torch.bfloat16)
    yield replace(
        COMBINE_GRADIENTS, name="moe_experts combine, d weights", launch=partial(_combine_gradients, of_hidden=False)
    ).case(odd, torch.float32)
    yield _sort_case(whole, torch.int64)
    yield _sort_case(whole, torch.int32)
