"""Cases of the kernels of policy_loss, over blocks of tokens."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from verify.case import Case

from minirl_kernels.ops.policy_loss import triton
from minirl_kernels.ops.policy_loss.kernel_arguments import (
    CorrectionOptions,
    InputValues,
    LossOptions,
    ResponseSums,
    TokenResults,
    TokenValues,
    WeightOptions,
)
from minirl_kernels.ops.policy_loss.objective_kernels import ObjectiveOptions

PADDED, LONG = (3, 1500), (2, 4096)
PACKED = (700, 1, 0, 2300, 1024, 90)
MODES = ("seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm", "token-mean", "group-token-mean")
MINIRL = ObjectiveOptions("minirl", "token", True, 0.8, 1.27)
PLAIN = CorrectionOptions("plain", 0.0, math.inf, "truncate", True, False)
OF_RESPONSE = CorrectionOptions("sequence_mean", 0.5, 2.0, "mask_response", True, True)
OPTIONS = LossOptions("w in loss", 5.0, 0.1, "k3", 0.01)


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
    counts, *others = triton.count_tokens(operands.arguments, operands.blocks, operands.group_ids, operands.ids.device)
    return tuple(values for values in (*counts, *others) if values is not None)


def _inputs(operands: Operands, *, mode: str = MODES[0], given: bool = False) -> tuple[Tensor, ...]:
    blocks, of_blocks = operands.blocks, torch.ones(operands.blocks.number, dtype=torch.int32)
    counts = triton.Counts(of_blocks, of_blocks.long(), torch.ones(operands.num_responses, dtype=torch.int32))
    options = WeightOptions(torch.ones(1) if given else None, 0.0, 2.0, mode)
    weights = operands.floats if mode == "given" else None
    device = operands.ids.device
    return triton.write_inputs(operands.arguments, blocks, counts, options, weights=weights, device=device)


def _response_sums(operands: Operands, **changes) -> tuple[Tensor, ...]:
    """changes: fields of the correction, here and below."""
    options = OF_RESPONSE._replace(**{"normalise": False, **changes})
    return (triton.response_sums(operands.others, operands.values, options).of_blocks,)


def _mean_weight(operands: Operands, **changes) -> tuple[Tensor, ...]:
    return (triton.mean_weight(_sums_of_blocks(operands), operands.blocks, OF_RESPONSE._replace(**changes)).view(1),)


def _behaviour(operands: Operands, **changes) -> tuple[Tensor, ...]:
    options = OF_RESPONSE._replace(**changes)
    return (triton.behaviour(operands.values, _response_sums_of(operands, options), options),)


def _ratios(operands: Operands, *, level: str = "sequence_mean", **changes) -> tuple[Tensor, ...]:
    options = OF_RESPONSE._replace(**changes)
    sums = _response_sums_of(operands, options)
    return tuple(triton.ratios(operands.others, operands.values, sums, level, options))


def _response_sums_of(operands: Operands, options: CorrectionOptions) -> ResponseSums:
    log_mean = torch.zeros((), dtype=torch.float64) if options.normalise else None
    return ResponseSums(_sums_of_blocks(operands), log_mean)


def _sums_of_blocks(operands: Operands) -> Tensor:
    return torch.ones(triton.NUM_RESPONSE_SUMS, operands.blocks.number, dtype=torch.float64)


def _sums(
    operands: Operands,
    *,
    given: bool = False,
    objective: ObjectiveOptions = MINIRL,
    correction: CorrectionOptions = PLAIN,
    **changes,
) -> tuple[Tensor, ...]:
    """given: the losses are given. changes: fields of the options."""
    dtype, bounds = torch.float32 if objective.objective else torch.float64, not objective.objective
    losses = [operands.floats.to(dtype)] * 2 if given or bounds else [None] * 2
    results = TokenResults(operands.others, operands.others, *losses, *[operands.mask.bool()] * 2 * bounds)
    by_response = correction.needs_responses or objective.level != "token"
    sums = _response_sums_of(operands, correction) if by_response else ResponseSums()
    out = triton.token_sums(results, operands.values, sums, objective, correction, OPTIONS._replace(**changes))
    return tuple(values for values in out if values is not None)


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
    "policy_loss_inputs": (_inputs, 33, 16),
    "policy_loss_response_sums": (_response_sums, 21, 0),
    "policy_loss_mean_weight": (_mean_weight, 0, 56),
    "policy_loss_behaviour": (_behaviour, 9, 24),
    "policy_loss_ratios": (_ratios, 21, 40),
    "policy_loss_sums": (_sums, 41, 0),
    "policy_loss_totals": (_totals, 0, 216),
}
CONFIGS = {"policy_loss_totals": triton.LANES, "policy_loss_mean_weight": triton.MEAN_LANES}
OTHER_INPUTS = {mode: {"mode": mode} for mode in (*MODES[1:], "given")} | {
    "token-mean of a count": {"mode": "token-mean", "given": True}
}
BY_TOKEN = OF_RESPONSE._replace(correction="token")
OTHER_CORRECTIONS = {
    "token": {"correction": "token", "beyond": "truncate", "normalise": False},
    "mask of token": {"correction": "token", "beyond": "mask_token", "weighs": False, "normalise": False},
    "token, mask_response": {"correction": "token"},
    "sequence": {"correction": "sequence", "beyond": "truncate"},
}
CORRECTED = ("policy_loss_response_sums", "policy_loss_mean_weight", "policy_loss_behaviour", "policy_loss_ratios")
_BOUNDS = (True, 0.8, 1.27)
OTHER_SUMS: dict[str, dict[str, Any]] = {
    "reinforce": {"objective": ObjectiveOptions("reinforce"), "kl_estimator": "k1"},
    "sequence_is": {"objective": ObjectiveOptions("reinforce", "sequence"), "correction": OF_RESPONSE},
    "grpo": {"objective": ObjectiveOptions("grpo", "token", *_BOUNDS), "weighting": "d in loss", "kl_estimator": "k2"},
    "gspo": {"objective": ObjectiveOptions("grpo", "sequence_mean", *_BOUNDS), "weighting": "d in loss"},
    "cispo": {"objective": ObjectiveOptions("cispo", "token", *_BOUNDS), "weighting": "d in loss", "kl_coef": 0.0},
    "sapo": {"objective": ObjectiveOptions("sapo", low=1.05, high=1.0), "weighting": "d"},
    "two_sided": {"objective": ObjectiveOptions("two_sided", "token", *_BOUNDS, 3.0, 20.0), "weighting": "d"},
    "dppo": {"objective": ObjectiveOptions("dppo_tv", "token", True, 0.1, 0.1)},
    "dppo by KL": {"objective": ObjectiveOptions("dppo_kl", "token", True, 0.1, 0.1)},
    "minirl of a corrected response": {"correction": OF_RESPONSE},
    "minirl of corrected tokens": {"correction": BY_TOKEN},
    "minirl of given losses": {"given": True, "entropy_coef": 0.0},
    "cispo of given losses": {"given": True, "objective": ObjectiveOptions("cispo", "token", *_BOUNDS)},
    "of given losses and bounds": {"objective": ObjectiveOptions(level="sequence"), "weighting": "d"},
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
        config=lambda: CONFIGS.get(name, triton.BLOCK),
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
    for name, (branch, options) in itertools.product(CORRECTED, OTHER_CORRECTIONS.items()):
        if not options.get("normalise", True) and name == "policy_loss_mean_weight":
            continue
        yield _case(name, PACKED, True, torch.float32, branch, **options)
    for branch, options in OTHER_SUMS.items():
        yield _case("policy_loss_sums", PACKED, True, torch.float32, branch, **options)
