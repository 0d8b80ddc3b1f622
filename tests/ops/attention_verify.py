"""Cases of the kernels of attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from verify.case import Case, allow_wide_accesses, gap

from minirl_kernels.common.triton import architecture
from minirl_kernels.ops.attention import kernels_shared, triton
from minirl_kernels.ops.attention.kernels_backward import backward_kv, backward_kv_config, backward_q, backward_q_config
from minirl_kernels.ops.attention.kernels_forward import attention_config
from minirl_kernels.ops.attention.kernels_shared import TileConfig


@dataclass(frozen=True)
class Sizes:
    queries: tuple[int, ...]  # queries of each sequence; keys likewise
    keys: tuple[int, ...]
    key_heads: int
    group: int  # query heads for each key head
    key_size: int
    value_size: int
    padding: int = 0  # elements between two heads

    def __str__(self) -> str:
        heads = f"{self.key_heads} heads of keys for {self.group} each"
        size = f"D = {self.key_size}, Dv = {self.value_size}{gap(self.padding, 'heads')}"
        return f"{self.queries} queries of {self.keys} keys, {heads}, {size}"


@dataclass(frozen=True)
class Operands:
    """All inputs of the kernels. The checks do not look at their values."""

    q: Tensor  # [1, Hq, Tq, D]
    k: Tensor
    v: Tensor
    spans: Tensor
    out: Tensor  # [1, Tq, Hq, Dv], as grad_out
    stats: Tensor
    grad_out: Tensor
    deltas: Tensor

    @classmethod
    def make(cls, sizes: Sizes, dtype: torch.dtype, *, traps: bool = False) -> Operands:
        """Traps are a sequence without queries, one without keys, and one of more queries than keys."""
        random = torch.Generator().manual_seed(sizes.key_size)
        queries, keys = sizes.queries, sizes.keys
        if traps:
            queries, keys = (*queries, 0, 3, 5), (*keys, 4, 0, 2)

        def normal(tokens, heads, size):
            values = torch.randn(tokens, heads, size + sizes.padding, generator=random).to(dtype)
            return values[..., :size].transpose(0, 1)[None]

        heads = sizes.key_heads * sizes.group
        starts = [torch.tensor([0, *lengths]).cumsum(0)[:-1] for lengths in (queries, keys)]
        columns = [torch.zeros(len(queries)), starts[0], torch.tensor(queries), starts[1], torch.tensor(keys)]
        shape = (1, sum(queries), heads)
        out, grad_out = (torch.randn(*shape, sizes.value_size, generator=random).to(dtype) for _ in range(2))
        return cls(
            q=normal(sum(queries), heads, sizes.key_size),
            k=normal(sum(keys), sizes.key_heads, sizes.key_size),
            v=normal(sum(keys), sizes.key_heads, sizes.value_size),
            spans=torch.stack([column.long() for column in columns], 1),
            out=out,
            stats=torch.ones(*shape, 2),
            grad_out=grad_out,
            deltas=torch.zeros(shape),
        )


@dataclass(frozen=True)
class Kernel:
    """A kernel with one set of options: launch(operands) as in Case, and its configuration.

    loads(sizes, config, split, bytes of an element): the bytes that it loads, without the spans. A head is split if its
        size takes more than one block; each product of rows then loads both of its operands.
    numbers: of the spans, that a program loads beside its search: the ends of its slot and its span; and two spans
        twice, to check them.
    """

    name: str
    launch: Callable[[Operands], tuple[Tensor, ...]]
    config: Callable[[int, torch.dtype, str], TileConfig]
    loads: Callable[[Sizes, TileConfig, bool, int], int]
    numbers: int

    def case(self, sizes: Sizes, dtype: torch.dtype) -> Case:
        widest = max(sizes.key_size, sizes.value_size)

        def config():
            return self.config(widest, dtype, architecture.of(torch.device("cpu")))

        def most_loaded(programs):
            steps = len(sizes.queries).bit_length()  # of the search for a span
            of_spans = 8 * (self.numbers + 2 * steps) * programs
            return self.loads(sizes, config(), config().depth < widest, dtype.itemsize) + of_spans

        return Case(
            name=self.name,
            dtype=dtype,
            size=str(sizes.key_size),
            sizes=str(sizes),
            operands=partial(Operands.make, sizes, dtype),
            launch=self.launch,
            config=config,
            most_loaded=most_loaded,
            unit="queries",
            unit_bytes=sum(sizes.queries) * sizes.key_heads * sizes.group * sizes.key_size * dtype.itemsize,
            loads_wide=allow_wide_accesses(dtype, sizes.key_size, sizes.value_size, sizes.padding),
            on_tensor_cores=dtype.itemsize == 2,
            alike=lambda: [self.case(replace(sizes, padding=padding), dtype) for padding in (3, 64)],
        )


SCALE = 0.1


def _forward(operands: Operands, *, causal: bool = True, for_backward: bool = True) -> tuple[Tensor, ...]:
    out, stats = triton.forward(*_read(operands), causal, SCALE, for_backward)
    return (out, stats) if for_backward else (out,)


def _read(operands: Operands) -> kernels_shared.Operands:
    return kernels_shared.Operands(operands.q, operands.k, operands.v, operands.spans, None)


def _empty_grad(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3])


def _backward_q(operands: Operands, *, causal: bool = True, needed: bool = True) -> tuple[Tensor, ...]:
    grad, deltas = _empty_grad(operands.q) if needed else None, torch.empty_like(operands.deltas)
    read = (*_read(operands), operands.out, operands.stats, operands.grad_out)
    backward_q(*read, deltas, grad, causal=causal, scale=SCALE)
    return (deltas, grad) if needed else (deltas,)


def _backward_kv(
    operands: Operands, *, causal: bool = True, of_k: bool = True, of_v: bool = True
) -> tuple[Tensor, ...]:
    grads = (_empty_grad(operands.k) if of_k else None, _empty_grad(operands.v) if of_v else None)
    read = (*_read(operands), operands.stats, operands.grad_out, operands.deltas)
    backward_kv(*read, *grads, causal=causal, scale=SCALE)
    return tuple(grad for grad in grads if grad is not None)


def _blocks_of_rows(sizes: Sizes, config: TileConfig) -> Iterator[tuple[int, int, int]]:
    """(rows, keys that any of the rows sees, blocks of such keys) of each program and sequence, causal."""
    for queries, keys in zip(sizes.queries, sizes.keys, strict=True):
        rows = queries * sizes.group
        for first in range(0, rows, config.rows):
            last = min(first + config.rows, rows) - 1
            seen = max(keys - queries + last // sizes.group + 1, 0)
            yield last + 1 - first, seen, -(-seen // config.keys)


def _loads_of_forward(sizes: Sizes, config: TileConfig, split: bool, item: int) -> int:
    """Each block of rows loads its rows once and its keys once; if split, its rows once for each block of keys."""
    d, dv = sizes.key_size, sizes.value_size
    elements = sum(
        rows * d * (blocks if split else 1) + seen * (d + dv) for rows, seen, blocks in _blocks_of_rows(sizes, config)
    )
    return sizes.key_heads * elements * item


def _loads_of_backward_q(sizes: Sizes, config: TileConfig, split: bool, item: int) -> int:
    """The loads of the forward, and the rows of out and grad_out; if split, the keys a second time."""
    d, dv = sizes.key_size, sizes.value_size
    elements = sum(
        rows * (2 * dv + (d + dv) * (blocks if split else 1) - (0 if split else dv))
        + seen * (d * (2 if split else 1) + dv)
        for rows, seen, blocks in _blocks_of_rows(sizes, config)
    )
    stats = 8 * sum(sizes.queries) * sizes.group
    return sizes.key_heads * (elements * item + stats)


def _loads_of_backward_kv(sizes: Sizes, config: TileConfig, split: bool, item: int) -> int:
    """Each block of keys loads its keys once, and each block of rows that contains a row which sees one of the keys."""
    d, dv = sizes.key_size, sizes.value_size
    loaded = 0
    for queries, keys in zip(sizes.queries, sizes.keys, strict=True):
        rows = queries * sizes.group
        for first in range(0, keys, config.keys):
            count = min(config.keys, keys - first)
            first_row = max(first - (keys - queries), 0) * sizes.group // config.rows * config.rows
            seeing = max(rows - first_row, 0)
            blocks = -(-seeing // config.rows)
            of_keys = count * (d + dv) * (blocks if split else 1)
            loaded += (of_keys + seeing * (d + dv) * (2 if split else 1)) * item + 12 * seeing
    return sizes.key_heads * loaded


KERNELS = (
    Kernel("attention", _forward, attention_config, _loads_of_forward, 10 + 28),
    Kernel("attention backward q", _backward_q, backward_q_config, _loads_of_backward_q, 10),
    Kernel("attention backward k, v", _backward_kv, backward_kv_config, _loads_of_backward_kv, 10),
)


def _other_branches() -> Iterator[Kernel]:
    """The options that compile further branches of the kernels than KERNELS does."""
    forward, _, backward_kv = KERNELS
    for kernel in KERNELS:
        yield replace(kernel, name=f"{kernel.name}, not causal", launch=partial(kernel.launch, causal=False))
    yield replace(forward, name="attention without a backward", launch=partial(_forward, for_backward=False))
    yield replace(backward_kv, name="attention backward k", launch=partial(_backward_kv, of_v=False))
    yield replace(backward_kv, name="attention backward v", launch=partial(_backward_kv, of_k=False))


def interpreter_cases() -> Iterator[Case]:
    """One block of each size; several blocks, in sizes that no block divides; heads with a gap between them."""
    for kernel in KERNELS:
        yield kernel.case(Sizes((9, 3), (9, 5), 2, 1, 16, 16), torch.float32)
        yield kernel.case(Sizes((50, 1), (70, 33), 2, 3, 37, 21, padding=3), torch.bfloat16)
        yield kernel.case(Sizes((40,), (40,), 1, 2, 24, 40, padding=8), torch.float16)


def compile_cases() -> Iterator[Case]:
    """Every launch configuration. The code also depends on D and on the group, which differ between models."""

    def sizes(size):
        return Sizes((16, 3), (16, 20), 2, 4, size, size)

    for kernel in KERNELS:
        for size in (64, 128, 256, 80, 63):
            yield kernel.case(sizes(size), torch.bfloat16)
            yield kernel.case(sizes(size), torch.float32)
        yield kernel.case(sizes(128), torch.float16)
    for kernel in _other_branches():
        yield kernel.case(sizes(128), torch.bfloat16)
