"""Cases of the kernels of policy_loss, over blocks of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from verify.case import Case

from minirl_kernels.ops.policy_loss import triton
from minirl_kernels.ops.policy_loss.kernel_arguments import (
    InputValues,
    LossOptions,
    TokenResults,
    TokenValues,
    WeightOptions,
)

PADDED, LONG = (3, 1500), (2, 4096)
PACKED = (700, 1, 0, 2300, 1024, 90)
MODES = ("seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm", "token-mean", "group-token-mean")
MINIRL = LossOptions("minirl", True, 0.8, 1.27, 5.0, True, 0.1, "k3", 0.01)


@dataclass(frozen=True)
class Operands:
    """The arguments of a loss; packed if offsets is given. Traps: tokens with an id of -100, or of masked responses."""

    offsets: Tensor | None
    shape: tuple[int, ...]
    num_responses: int
    floats: Tensor  # float32, of the shape
    others: Tensor  # of the dtype of the case
    ids: Tensor
    mask: Tensor  # uint8
    group_ids: Tensor

    @classmethod
    def make(cls, lengths: tuple[int, ...], packed: bool, dtype: torch.dtype, *, traps: bool = False) -> Operands:
        random = torch.Generator().manual_seed(len(lengths))
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0)
        shape = (sum(lengths),) if packed else lengths
        ids = torch.randint(1000, shape, generator=random)
        mask = (torch.rand(shape, generator=random) < 0.8).to(torch.uint8)
        if traps:
            ids.view(-1)[::3] = -100
        num_responses = len(lengths) if packed else shape[0]
        return cls(
            ends if packed else None,
            shape,
            num_responses,
            -torch.rand(shape, generator=random),
            -torch.rand(shape, generator=random).to(dtype),
            ids,
            mask,
            torch.arange(num_responses) % 2,
        )

    @property
    def blocks(self) -> triton.Blocks:
        return triton.Blocks.of(list(self.shape), self.offsets)

    @property
    def arguments(self) -> InputValues:
        return InputValues(self.ids, self.mask, self.others, self.others, self.others, self.others)

    @property
    def values(self) -> TokenValues:
        return TokenValues(self.mask.bool(), *[self.floats] * 5, self.offsets)


def _count(operands: Operands) -> tuple[Tensor, ...]:
    results = triton.count_tokens(operands.arguments, operands.blocks, operands.group_ids, operands.ids.device)
    return tuple(values for values in results if values is not None)


def _count_groups(operands: Operands) -> tuple[Tensor, ...]:
    ones = torch.ones(operands.blocks.number, dtype=torch.int32)
    counts = triton.count_groups(operands.group_ids, ones, ones.long())
    return counts.of_groups, counts.is_first


def _inputs(operands: Operands, *, mode: str = MODES[0], given: bool = False) -> tuple[Tensor, ...]:
    blocks, responses = operands.blocks, torch.ones(operands.num_responses, dtype=torch.int32)
    counts = triton.Counts(torch.ones(blocks.number, dtype=torch.int32), responses, responses)
    options = WeightOptions(torch.ones(1) if given else None, 0.0, 2.0, mode)
    weights = operands.floats if mode == "given" else None
    device = operands.ids.device
    return triton.write_inputs(operands.arguments, blocks, counts, options, weights=weights, device=device)


def _sums(operands: Operands, *, with_loss: bool = False, bounds: bool = False, **changes) -> tuple[Tensor, ...]:
    """changes: fields of the options."""
    losses = [operands.floats] * 2 if with_loss else [None] * 2
    results = TokenResults(operands.others, operands.others, *losses, *[operands.mask.bool()] * 3 * bounds)
    out, sums, maxima = triton.token_sums(results, operands.values, MINIRL._replace(**changes))
    return *out[:4], sums, maxima


def _totals(operands: Operands, *, with_rollout: bool = True) -> tuple[Tensor, ...]:
    sums, maxima = (
        torch.ones(rows, operands.blocks.number, dtype=torch.float64)
        for rows in (triton.NUM_BLOCK_SUMS, triton.NUM_BLOCK_MAXIMA)
    )
    loss, *others = triton.totals(sums, maxima, operands.blocks, with_rollout)
    return loss.view(1), *others


# kernel: bytes that it may load for each token, and for each block and each response of a program
KERNELS: dict[str, tuple[Callable[..., Any], int, int]] = {
    "policy_loss_counts": (_count, 9, 0),
    "policy_loss_groups": (_count_groups, 0, 20),
    "policy_loss_inputs": (_inputs, 33, 16),
    "policy_loss_sums": (_sums, 41, 0),
    "policy_loss_totals": (_totals, 0, 216),
}
OTHER_INPUTS = {mode: {"mode": mode} for mode in (*MODES[1:], "given")} | {
    "token-mean of a count": {"mode": "token-mean", "given": True}
}
OTHER_SUMS = {
    "reinforce": {"objective": "reinforce", "clip": False, "kl_estimator": "k1"},
    "grpo": {"objective": "grpo", "kl_estimator": "k2"},
    "cispo": {"objective": "cispo", "kl_coef": 0.0},
    "minirl of given losses": {"with_loss": True, "entropy_coef": 0.0},
    "cispo of given losses": {"with_loss": True, "objective": "cispo"},
    "of given losses and bounds": {"with_loss": True, "bounds": True, "objective": ""},
}


def _case(name: str, lengths: tuple[int, ...], packed: bool, dtype: torch.dtype, branch: str = "", **options) -> Case:
    launch, of_token, of_block = KERNELS[name]
    operands = partial(Operands.make, lengths, packed, dtype)
    made = operands()
    num_tokens, around = made.blocks.num_tokens, made.blocks.number + made.num_responses + 1

    def most_loaded(programs: int) -> int:
        places = 64 + 24 * made.blocks.search_steps
        return of_token * num_tokens + programs * (places + of_block * around) + 32 * around

    return Case(
        name=f"{name}: {branch}" if branch else name,
        dtype=dtype,
        size="packed" if packed else "padded",
        sizes=f"{'packed' if packed else 'padded'} {lengths}",
        operands=operands,
        launch=partial(launch, **options),
        config=lambda: triton.LANES if name == "policy_loss_totals" else triton.BLOCK,
        most_loaded=most_loaded,
        unit="tokens",
        unit_bytes=num_tokens,
    )


def interpreter_cases() -> Iterator[Case]:
    for name in KERNELS:
        yield _case(name, PADDED, False, torch.float32)
        yield _case(name, PACKED, True, torch.bfloat16)
    yield _case("policy_loss_inputs", PACKED, True, torch.float32, "group-token-mean", mode="group-token-mean")


def compile_cases() -> Iterator[Case]:
    for name in KERNELS:
        yield _case(name, LONG, False, torch.bfloat16)
        yield _case(name, PACKED, True, torch.float32)
    for branch, options in OTHER_INPUTS.items():
        yield _case("policy_loss_inputs", PACKED, True, torch.float32, branch, **options)
    for branch, options in OTHER_SUMS.items():
        yield _case("policy_loss_sums", PACKED, True, torch.float32, branch, **options)
