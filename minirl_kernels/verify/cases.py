"""Every Triton kernel of the library and how to call it: the one list that all the checks go through."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..common.checks import IGNORE_INDEX
from ..common.triton import scale
from ..common.triton.launch import LaunchConfig
from ..ops.fused_policy_loss import triton as fused_policy_loss
from ..ops.kept_logits import triton as kept_logits
from ..ops.kept_logits.op import KeptRows
from ..ops.linear_token_logprobs.tiles import gradient_in_place
from ..ops.moe_routing import triton as moe_routing
from ..ops.token_logprobs import triton as token_logprobs
from . import attention_cases, expert_cases, matmul_cases, row_cases
from .attention_cases import AttentionCase
from .expert_cases import ExpertsCase
from .matmul_cases import MatmulCase
from .row_cases import RowsCase

QWEN3_VOCAB, GPT2_VOCAB = 151_936, 50_257
# what a program reads beside logits: its token's id, temperature, gradient, ...
BYTES_OF_A_PROGRAM = 64


@dataclass(frozen=True)
class Rows:
    """Inputs that every kernel over rows of logits takes: [T, V], and [T] for the others."""

    logits: Tensor
    token_ids: Tensor
    temperature: Tensor
    values: Tensor  # log-probabilities, advantages, weights, gradients: what is in them does not matter here
    bias: Tensor  # [V]

    @classmethod
    def make(cls, vocab_size: int, dtype: torch.dtype, *, padding: int = 0, traps: bool = False) -> Rows:
        """Four rows, the same every time, `padding` elements apart; with traps, one token of each kind that is not
        read or not written as others are: one without any gradient, an ignored one, one out of range."""
        random = torch.Generator().manual_seed(vocab_size)
        buffer = torch.randn(4, vocab_size + padding, generator=random).to(dtype)
        token_ids = torch.randint(vocab_size, (4,), generator=random)
        values = torch.rand(4, generator=random) - 1.5
        if traps:
            values[0], token_ids[1], token_ids[2] = 0, IGNORE_INDEX, vocab_size
        bias = torch.randn(vocab_size, generator=random)
        return cls(buffer[:, :vocab_size], token_ids, torch.full((4,), 0.7), values, bias)


@dataclass(frozen=True)
class Kernel:
    """call(rows) launches it once and returns every tensor it writes; config(V, dtype) is its launch configuration.

    reads(config, V): how many times it may read the logits. streams_out: whether it writes a tensor of their size.
    out_dtype: of that tensor, where it is not the logits'.
    """

    name: str
    call: Callable[[Rows], tuple[Tensor, ...]]
    config: Callable[[int, torch.dtype], LaunchConfig]
    reads: Callable[[LaunchConfig, int], float]
    streams_out: bool = True
    out_dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Case:
    kernel: Kernel
    vocab_size: int
    dtype: torch.dtype
    padding: int = 0

    unit = "logits"  # what the traffic is told in

    def rows(self, *, traps: bool = False) -> Rows:
        return Rows.make(self.vocab_size, self.dtype, padding=self.padding, traps=traps)

    def run(self, *, traps: bool = False) -> tuple[Tensor, ...]:
        """One launch, and all that it writes; with traps, tokens that are not read or not written as others are."""
        return self.kernel.call(self.rows(traps=traps))

    @property
    def unit_bytes(self) -> int:
        return self.rows().logits.numel() * self.dtype.itemsize

    def most_loaded(self, programs: int) -> int:
        """Bytes, by a launch of so many programs."""
        return int(self.kernel.reads(self.config, self.vocab_size) * self.unit_bytes) + BYTES_OF_A_PROGRAM * programs

    @property
    def config(self) -> LaunchConfig:
        return self.kernel.config(self.vocab_size, self.dtype)

    @property
    def size(self) -> str:
        return f"{self.vocab_size:,}"

    @property
    def is_aligned(self) -> bool:
        """Whether every row begins and ends at a multiple of 128 bits."""
        narrowest = self.kernel.out_dtype or self.dtype
        return all(n * narrowest.itemsize % 16 == 0 for n in (self.vocab_size, self.padding))

    @property
    def loads_wide(self) -> bool:
        """Whether accesses of 128 bits are due."""
        return self.is_aligned and self.kernel.reads(self.config, self.vocab_size) >= 1

    @property
    def stores_wide(self) -> bool:
        return self.is_aligned and self.kernel.streams_out

    @property
    def on_tensor_cores(self) -> bool:
        """Whether instructions of theirs are due."""
        return False

    def __str__(self) -> str:
        apart = f", {self.padding} between rows" if self.padding else ""
        return f"{self.kernel.name}, {str(self.dtype).removeprefix('torch.')}, V = {self.vocab_size:,}{apart}"


AnyCase = AttentionCase | Case | ExpertsCase | MatmulCase | RowsCase


def _once(config: LaunchConfig, vocab_size: int) -> float:
    return 1.0


def _twice_less_a_tile(config: LaunchConfig, vocab_size: int) -> float:
    return 2 - min(config.tile / vocab_size, 1)


def _with_bias(reads: Callable[[LaunchConfig, int], float], sweeps: int) -> Callable[[LaunchConfig, int], float]:
    """A bias is as long as a row, and read whole in each sweep over the row."""
    return lambda config, vocab_size: reads(config, vocab_size) + sweeps


def _token_logprobs_forward(rows: Rows, *, with_entropy: bool = True, **head) -> tuple[Tensor, ...]:
    return token_logprobs.forward(rows.logits, rows.token_ids, rows.temperature, with_entropy, **head)


def _token_logprobs_backward(rows: Rows, *, with_entropy: bool = True) -> tuple[Tensor, ...]:
    out = torch.empty_like(rows.logits, memory_format=torch.contiguous_format)
    return _token_logprobs_backward_into(rows, out, with_entropy=with_entropy)


def _token_logprobs_backward_into(rows: Rows, out: Tensor, *, with_entropy: bool = True, **head) -> tuple[Tensor]:
    shift = rows.logits.float().amax(-1)
    per_token = (shift, rows.values, rows.values, rows.values, rows.values if with_entropy else None)
    token_logprobs.backward(rows.logits, rows.token_ids, rows.temperature, *per_token, out, **head)
    return (out,)


def _fused_policy_loss(rows: Rows, out: Tensor, **options) -> tuple[Tensor, ...]:
    arguments = {
        "old_log_probs": rows.values,
        "behaviour_log_probs": rows.values,
        "ref_log_probs": rows.values,
        "advantages": rows.values,
        "weights": rows.values,
        "objective": "minirl",
        "clip": True,
        "ratio_low": 0.0,
        "ratio_high": float("inf"),
        "threshold": 5.0,
        "kl_coef": 0.1,
        "kl_estimator": "k3",
        "entropy_coef": 0.01,
        **options,
    }
    return *fused_policy_loss.forward_backward(rows.logits, rows.token_ids, rows.temperature, **arguments, out=out), out


def _fused_policy_loss_apart(rows: Rows, **options) -> tuple[Tensor, ...]:
    return _fused_policy_loss(rows, torch.empty_like(rows.logits, memory_format=torch.contiguous_format), **options)


def _fused_policy_loss_in_place(rows: Rows) -> tuple[Tensor, ...]:
    return _fused_policy_loss(rows, rows.logits)


def _scale(rows: Rows) -> tuple[Tensor, ...]:
    scale.scale_in_place(rows.logits, rows.temperature[0])
    return (rows.logits,)


def _kept_logits(rows: Rows) -> tuple[Tensor, ...]:
    """Sets of the first token, of the last, and of two in the middle; a row without a set is not touched."""
    vocab_size = rows.logits.shape[1]
    middle = vocab_size // 2
    ids = torch.tensor([0, vocab_size - 1, middle, middle + 1], dtype=torch.int32)
    begin, end = (torch.tensor(places, dtype=torch.int32) for places in ([0, 1, 1, 2], [1, 1, 2, 4]))
    kept_logits.keep_(rows.logits, KeptRows(ids, begin, end))
    first, _, last, both = rows.logits
    return first[1:], last[:-1], both[:middle], both[middle + 2 :]


def _moe_routing(
    rows: Rows, *, replay=True, norm=True, scoring="softmax", with_bias=False, groups=(1, 1), top_k=4
) -> tuple[Tensor, ...]:
    """Here V is the number of experts. With traps, a row routes naturally and a row has an expert out of range."""
    ids, num_experts = rows.token_ids[:, None], rows.logits.shape[1]
    routed = ((ids + torch.arange(top_k)) % num_experts).where(ids < num_experts, ids) if replay else None
    valid = rows.token_ids != IGNORE_INDEX if replay else None
    bias = torch.zeros(num_experts) if with_bias else None
    found = moe_routing.forward(rows.logits, top_k, routed, valid, norm, scoring, bias, *groups, 2.0)
    return tuple(values for values in found if values.numel())


def _moe_routing_backward(rows: Rows, *, norm=False, scoring="softmax", top_k=4) -> tuple[Tensor, ...]:
    weights = rows.values[:, None].expand(-1, top_k).contiguous()
    experts = (rows.token_ids[:, None] + torch.arange(top_k)) % rows.logits.shape[1]
    out = torch.empty_like(rows.logits, memory_format=torch.contiguous_format)
    moe_routing.backward(rows.logits, weights, experts, weights, norm, scoring, 2.0, out)
    return (out,)


def _once_and_a_bias(config: LaunchConfig, vocab_size: int) -> float:
    return 1 + config.vec / 4  # float32, beside logits of 16 / vec bytes


def _nothing(config: LaunchConfig, vocab_size: int) -> float:
    return 0.0


def _chosen_ones(config: LaunchConfig, vocab_size: int) -> float:
    return 4 / vocab_size


KERNELS = (
    Kernel("token_logprobs", _token_logprobs_forward, token_logprobs.forward_config, _once, streams_out=False),
    Kernel("token_logprobs_backward", _token_logprobs_backward, token_logprobs.backward_config, _once),
    Kernel("fused_policy_loss", _fused_policy_loss_apart, fused_policy_loss.launch_config, _twice_less_a_tile),
    Kernel("scale_in_place", _scale, scale.launch_config, _once),
    Kernel("kept_logits", _kept_logits, kept_logits.launch_config, _nothing),
)
# over router logits, of which a row is one tile: they have sizes of their own
ROUTERS = (
    Kernel("moe_routing", _moe_routing, moe_routing.launch_config, _once, streams_out=False),
    Kernel("moe_routing_backward", _moe_routing_backward, moe_routing.launch_config, _once),
)
_BY_GROUPS = replace(
    ROUTERS[0],
    name="moe_routing by groups",
    call=partial(_moe_routing, scoring="sigmoid", with_bias=True, groups=(4, 2)),
    reads=_once_and_a_bias,
)
# compiled, it is the same kernel
FUSED_IN_PLACE = replace(KERNELS[2], name="fused_policy_loss in place", call=_fused_policy_loss_in_place)


def _narrower(dtype: torch.dtype, *, softcap: float | None = None, with_bias: bool = False) -> Iterator[Kernel]:
    """On tiles of a linear head: a 16-bit gradient over float32 logits, and what may come between the two."""

    def head(rows):
        return {"softcap": softcap, "bias": rows.bias if with_bias else None}

    between = "".join([", softcap" if softcap else "", ", bias" if with_bias else ""])
    kernels = (
        (KERNELS[1], 1, lambda rows, out: _token_logprobs_backward_into(rows, out, **head(rows))),
        (KERNELS[2], 2, lambda rows, out: _fused_policy_loss(rows, out, **head(rows))),
    )
    for kernel, sweeps, call in kernels:
        yield replace(
            kernel,
            name=f"{kernel.name}, {str(dtype).removeprefix('torch.')} in place{between}",
            call=lambda rows, call=call: call(rows, gradient_in_place(rows.logits, dtype)),
            config=partial(kernel.config, out_dtype=dtype),
            reads=_with_bias(kernel.reads, sweeps) if with_bias else kernel.reads,
            out_dtype=dtype,
        )


NARROWER = tuple(_narrower(torch.bfloat16))
HEADS = (
    replace(
        KERNELS[0],
        name=f"{KERNELS[0].name}, softcap, bias",
        call=lambda rows: _token_logprobs_forward(rows, softcap=3.0, bias=rows.bias),
        reads=_with_bias(_once, 1),
    ),
    *_narrower(torch.bfloat16, softcap=3.0, with_bias=True),
)


def _other_branches() -> Iterator[Kernel]:
    """The kernels again with other options, until every branch that a compiler would see has been in one of them."""
    for kernel in KERNELS[:2]:
        name = f"{kernel.name} without entropy"
        yield replace(kernel, name=name, call=partial(kernel.call, with_entropy=False))
    for name, options in (
        ("minirl without KL", {"ref_log_probs": None}),
        ("minirl on policy", {"old_log_probs": None, "kl_estimator": "k1"}),
        ("minirl without clip and rollout_is", {"clip": False, "behaviour_log_probs": None}),
        ("reinforce", {"objective": "reinforce", "clip": False, "kl_estimator": "k2"}),
        ("grpo", {"objective": "grpo"}),
        ("grpo without clip, on policy", {"objective": "grpo", "clip": False, "old_log_probs": None}),
        ("cispo", {"objective": "cispo", "old_log_probs": None, "behaviour_log_probs": None}),
        ("cispo without clip", {"objective": "cispo", "clip": False}),
    ):
        yield replace(KERNELS[2], name=f"fused_policy_loss: {name}", call=partial(_fused_policy_loss_apart, **options))


def _other_branches_of_routers() -> Iterator[Kernel]:
    yield _BY_GROUPS
    for name, options in (
        ("softmax of all", {"norm": False, "replay": False}),
        ("sigmoid", {"norm": False, "scoring": "sigmoid"}),
        ("sigmoid, normalised", {"scoring": "sigmoid"}),
        ("softmax and bias", {"with_bias": True, "top_k": 8}),
        ("softmax by groups", {"groups": (4, 2)}),
    ):
        yield replace(ROUTERS[0], name=f"moe_routing: {name}", call=partial(_moe_routing, **options))
    for name, options in (
        ("softmax, normalised", {"norm": True}),
        ("sigmoid", {"scoring": "sigmoid"}),
        ("sigmoid, normalised", {"norm": True, "scoring": "sigmoid", "top_k": 8}),
    ):
        call = partial(_moe_routing_backward, **options)
        yield replace(ROUTERS[1], name=f"moe_routing_backward: {name}", call=call, reads=_chosen_ones)


def interpreter_cases() -> Iterator[AnyCase]:
    """Rows of one tile, of several, of a size that no tile divides, and rows that lie apart."""
    for kernel in (*KERNELS, FUSED_IN_PLACE):
        yield Case(kernel, 1_000, torch.float32)
        yield Case(kernel, 777, torch.bfloat16, padding=15)
        yield Case(kernel, 20_011, torch.float32)
        yield Case(kernel, 40_000, torch.bfloat16, padding=8)
    for kernel in (*NARROWER, *HEADS):
        yield Case(kernel, 777, torch.float32, padding=15)
        yield Case(kernel, 20_011, torch.float32)
        yield Case(kernel, 40_000, torch.float32, padding=8)
    for kernel in (*ROUTERS, _BY_GROUPS):
        yield Case(kernel, 128, torch.float32)
        yield Case(kernel, 60, torch.bfloat16, padding=15)
        yield Case(kernel, 1_024, torch.bfloat16, padding=8)
    yield from attention_cases.interpreter_cases()
    yield from expert_cases.interpreter_cases()
    yield from matmul_cases.interpreter_cases()
    yield from row_cases.interpreter_cases()


def compile_cases() -> Iterator[AnyCase]:
    """Every launch configuration: rows of one tile at the smallest power of two that has it, or at the odd number
    below, whose rows allow no 128-bit access; rows of many tiles at a real vocabulary, 151,936 or the odd 50,257. Then
    every other branch of the kernels, once."""
    powers = [2**n for n in range(9, 16)]
    odd = [power - 1 for power in powers]
    for kernel in KERNELS:
        yield from _launch_configurations(kernel, torch.bfloat16, powers, QWEN3_VOCAB)
        yield from _launch_configurations(kernel, torch.float32, powers, QWEN3_VOCAB)
        yield from _launch_configurations(kernel, torch.bfloat16, odd, GPT2_VOCAB)
        yield from _launch_configurations(kernel, torch.float32, [], GPT2_VOCAB)
        yield from _launch_configurations(kernel, torch.float16, [], QWEN3_VOCAB)
    for kernel in NARROWER:
        yield from _launch_configurations(kernel, torch.float32, powers, QWEN3_VOCAB)
        yield from _launch_configurations(kernel, torch.float32, odd, GPT2_VOCAB)
    for kernel in HEADS:
        yield from _launch_configurations(kernel, torch.float32, [], QWEN3_VOCAB)
        yield from _launch_configurations(kernel, torch.float32, [], GPT2_VOCAB)
    for kernel in _narrower(torch.float16):
        yield Case(kernel, QWEN3_VOCAB, torch.float32)
    for kernel in _other_branches():
        yield Case(kernel, QWEN3_VOCAB, torch.bfloat16)
    for kernel in ROUTERS:
        for dtype, sizes in (
            (torch.bfloat16, [512, 1_024, 2_048, 4_096, 60]),
            (torch.float32, [256, 512, 1_024, 2_048, 4_096, 60]),
            (torch.float16, [128]),
        ):
            yield from (Case(kernel, num_experts, dtype) for num_experts in sizes)
    for kernel in _other_branches_of_routers():
        yield Case(kernel, 256, torch.float32)
    yield from attention_cases.compile_cases()
    yield from expert_cases.compile_cases()
    yield from matmul_cases.compile_cases()
    yield from row_cases.compile_cases()


def _launch_configurations(kernel: Kernel, dtype: torch.dtype, one_tile: list[int], many_tiles: int) -> Iterator[Case]:
    seen = set()
    for vocab_size in one_tile:
        config = kernel.config(vocab_size, dtype)
        if vocab_size <= config.tile and config not in seen:
            seen.add(config)
            yield Case(kernel, vocab_size, dtype)
    yield Case(kernel, many_tiles, dtype)
