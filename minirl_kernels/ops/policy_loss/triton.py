"""policy_loss on the GPU: launches of the kernels over blocks of tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...common.triton.config import LaunchConfig
from ...common.triton.launch import prepared_over_blocks
from ...common.triton.sizes import cdiv, next_power_of_2
from .kernel_arguments import (
    CorrectionOptions,
    InputValues,
    LossOptions,
    ResponseSums,
    TokenResults,
    TokenValues,
    WeightOptions,
)
from .kernels_inputs import count_kernel, inputs_kernel
from .kernels_metrics import (
    NUM_BLOCK_MAXIMA,
    NUM_BLOCK_SUMS,
    NUM_MAXIMA,
    NUM_SUMS,
    token_sums_kernel,
    totals_kernel,
)
from .kernels_responses import (
    NUM_RESPONSE_SUMS,
    behaviour_kernel,
    mean_weight_kernel,
    ratios_kernel,
    response_sums_kernel,
)
from .metric_table import COUNTS, MAXIMA, SUMS
from .objective_kernels import ObjectiveOptions

# a token per thread: its numbers in float64 take many registers
BLOCK = LaunchConfig(lanes=512, vec=1, threads=512)
# a lane of totals_kernel is one response with all its sums
LANES = LaunchConfig(lanes=128, vec=next_power_of_2(NUM_BLOCK_SUMS), threads=256)
# a lane of mean_weight_kernel is one response
MEAN_LANES = LaunchConfig(lanes=128, vec=1, threads=128)

launch_count = prepared_over_blocks(count_kernel, BLOCK.tile, BLOCK)
launch_inputs = prepared_over_blocks(inputs_kernel, BLOCK.tile, BLOCK)
launch_response_sums = prepared_over_blocks(response_sums_kernel, BLOCK.tile, BLOCK)
launch_behaviour = prepared_over_blocks(behaviour_kernel, BLOCK.tile, BLOCK)
launch_ratios = prepared_over_blocks(ratios_kernel, BLOCK.tile, BLOCK)
launch_token_sums = prepared_over_blocks(token_sums_kernel, BLOCK.tile, BLOCK)
launch_mean_weight = prepared_over_blocks(mean_weight_kernel, BLOCK.tile, MEAN_LANES)
launch_totals = prepared_over_blocks(totals_kernel, BLOCK.tile, LANES)

if (len(COUNTS) + len(SUMS), len(MAXIMA)) != (NUM_SUMS, NUM_MAXIMA):
    raise RuntimeError(
        f"metric_table.py has {len(COUNTS) + len(SUMS)} counts and sums and {len(MAXIMA)} maxima, and the kernels have "
        f"{NUM_SUMS} and {NUM_MAXIMA}: each count, sum and maximum of METRICS must have its row in kernels_metrics.py"
    )


class Blocks(NamedTuple):
    """The blocks of tokens of a batch. offsets: [B + 1], or None if all responses have `length` tokens."""

    offsets: Tensor | None
    num_responses: int
    length: int
    num_tokens: int

    @classmethod
    def of(cls, shape: list[int], offsets: Tensor | None) -> Blocks:
        if offsets is None:
            return cls(None, shape[0], shape[1], shape[0] * shape[1])
        return cls(offsets, offsets.shape[0] - 1, 0, shape[0])

    @property
    def number(self) -> int:
        if self.offsets is None:
            return self.num_responses * cdiv(self.length, BLOCK.tile)
        return self.num_tokens // BLOCK.tile + self.num_responses if self.num_tokens else 0

    @property
    def search_steps(self) -> int:
        return self.num_responses.bit_length()

    def strides(self, values: Tensor | None) -> tuple[int, int]:
        """(stride of responses, stride of tokens) of a tensor per token."""
        if values is None:
            return 0, 0
        return values.stride() if self.offsets is None else (0, values.stride(0))


class Counts(NamedTuple):
    """Numbers of tokens in the loss of each block, int32; for a mean over groups the group of each block, and whether
    each response is the first of its group."""

    of_blocks: Tensor | None = None
    block_groups: Tensor | None = None
    is_first: Tensor | None = None


def count_tokens(
    values: InputValues, blocks: Blocks, group_ids: Tensor | None, device: torch.device
) -> tuple[Counts, Tensor | None, Tensor | None]:
    """(counts, offsets as int64, whether the offsets are valid). group_ids: contiguous."""
    counts = Counts(torch.empty(blocks.number, dtype=torch.int32, device=device))
    offsets = is_valid = None
    if group_ids is not None:
        block_groups = torch.empty(blocks.number, dtype=torch.int64, device=device)
        counts = Counts(counts.of_blocks, block_groups, torch.empty_like(group_ids, dtype=torch.int32))
    if blocks.offsets is not None:
        offsets = torch.empty(blocks.num_responses + 1, dtype=torch.int64, device=device)
        is_valid = torch.empty((), dtype=torch.uint8, device=device)
    launch_count(
        values.token_ids,
        values.loss_mask,
        blocks.offsets,
        group_ids,
        *counts,
        offsets,
        is_valid,
        programs=blocks.number,
        values=(
            blocks.num_responses,
            blocks.length,
            blocks.num_tokens,
            blocks.search_steps,
            *blocks.strides(values.token_ids),
            *blocks.strides(values.loss_mask),
        ),
    )
    return counts, offsets, is_valid


def write_inputs(
    values: InputValues,
    blocks: Blocks,
    counts: Counts,
    options: WeightOptions,
    *,
    weights: Tensor | None = None,
    device: torch.device,
) -> InputValues:
    """(token_ids, mask, weights, old_log_probs, rollout_log_probs, ref_log_probs, advantages), contiguous.

    A result is None if its values are None. weights: None if they are to be made.
    """
    shape = (blocks.num_responses, blocks.length) if blocks.offsets is None else (blocks.num_tokens,)
    per_token = (values.old_log_probs, values.rollout_log_probs, values.ref_log_probs, values.advantages)
    ids = None if values.token_ids is None else torch.empty(shape, dtype=values.token_ids.dtype, device=device)
    mask = torch.empty(shape, dtype=torch.uint8, device=device)
    out_weights = torch.empty(shape, dtype=torch.float32, device=device)
    copies = [None if x is None else torch.empty_like(out_weights) for x in per_token]
    advantage_strides = (0, 0)
    if values.advantages is not None:
        per_response = values.advantages.shape == (blocks.num_responses,)
        advantage_strides = (values.advantages.stride(0), 0) if per_response else blocks.strides(values.advantages)
    number = options.count_number or (None if options.counts_here else max(blocks.num_responses, 1))
    launch_inputs(
        values.token_ids,
        values.loss_mask,
        *per_token,
        weights,
        blocks.offsets,
        *counts,
        options.count,
        ids,
        mask,
        out_weights,
        *copies,
        programs=blocks.number,
        values=(
            None if number is None else float(number),
            options.scale,
            *_sizes(blocks),
            *blocks.strides(values.token_ids),
            *blocks.strides(values.loss_mask),
            *(stride for x in per_token[:3] for stride in blocks.strides(x)),
            *advantage_strides,
        ),
        MODE="given" if weights is not None else options.mode,
    )
    return ids, mask.view(torch.bool), out_weights, *copies


def response_sums(log_probs: Tensor | None, values: TokenValues, options: CorrectionOptions) -> ResponseSums:
    """log_probs: None if no sum of log r is needed; values then have old_log_probs."""
    blocks = Blocks.of(values.mask.shape, values.offsets)
    sums = torch.empty(NUM_RESPONSE_SUMS, blocks.number, dtype=torch.float64, device=values.mask.device)
    per_token = (log_probs, values.mask, values.old_log_probs, values.rollout_log_probs)
    launch_response_sums(
        *map(_flat, per_token),
        values.offsets,
        sums,
        programs=blocks.number,
        values=(options.lower, options.upper, *_sizes(blocks)),
        **_weighing(options),
    )
    return ResponseSums(sums, mean_weight(sums, blocks, options) if options.normalise else None)


def mean_weight(sums: Tensor, blocks: Blocks, options: CorrectionOptions) -> Tensor:
    """The log of the mean weight of the call. sums: of response_sums."""
    log_mean = sums.new_empty(())
    launch_mean_weight(
        sums,
        blocks.offsets,
        log_mean,
        programs=1,
        values=(options.lower, options.upper, *_sizes(blocks)[:3]),
        CORRECTION=options.correction,
        LANES=MEAN_LANES.lanes,
        **_weighing(options),
    )
    return log_mean


def behaviour(values: TokenValues, sums: ResponseSums, options: CorrectionOptions) -> Tensor:
    """log mu of each token after the correction, float32, where values have old_log_probs."""
    out = torch.empty(values.mask.shape, dtype=torch.float32, device=values.mask.device)
    blocks = Blocks.of(values.mask.shape, values.offsets)
    launch_behaviour(
        *map(_flat, (values.mask, values.old_log_probs, values.rollout_log_probs)),
        values.offsets,
        *sums,
        out,
        programs=blocks.number,
        values=(options.lower, options.upper, *_sizes(blocks)),
        CORRECTION=options.correction,
        **_weighing(options),
    )
    return out


def ratios(
    log_probs: Tensor, values: TokenValues, sums: ResponseSums, level: str, options: CorrectionOptions
) -> list[Tensor]:
    """log_prob, log_r, log_w and log_d of TokenRatios. level: the level of the objective."""
    out = [torch.empty(log_probs.shape, dtype=torch.float64, device=log_probs.device) for _ in range(4)]
    blocks = Blocks.of(log_probs.shape, values.offsets)
    launch_ratios(
        *map(_flat, (log_probs, values.mask, values.old_log_probs, values.rollout_log_probs)),
        values.offsets,
        *sums,
        *out,
        programs=blocks.number,
        values=(options.lower, options.upper, *_sizes(blocks)),
        LEVEL=level,
        CORRECTION=options.correction,
        **_weighing(options),
    )
    return out


class TokenSums(NamedTuple):
    """log_probs, entropy, token_loss and token_grad with 0 where masked; and of each block sums and maxima, float64."""

    log_probs: Tensor
    entropy: Tensor | None
    token_loss: Tensor
    token_grad: Tensor
    entropy_grad: Tensor | None
    sums: Tensor
    maxima: Tensor


def token_sums(
    results: TokenResults,
    values: TokenValues,
    response_sums: ResponseSums,
    objective: ObjectiveOptions,
    correction: CorrectionOptions,
    options: LossOptions,
) -> TokenSums:
    shape, device = results.log_probs.shape, results.log_probs.device
    blocks = Blocks.of(shape, values.offsets)

    def memory(is_needed: bool = True) -> Tensor | None:
        return torch.empty(shape, dtype=torch.float32, device=device) if is_needed else None

    out = TokenSums(
        memory(),
        memory(results.entropy is not None),
        memory(),
        memory(),
        memory(options.entropy_coef != 0),
        torch.empty(NUM_BLOCK_SUMS, blocks.number, dtype=torch.float64, device=device),
        torch.empty(NUM_BLOCK_MAXIMA, blocks.number, dtype=torch.float64, device=device),
    )
    launch_token_sums(
        *(_flat(x) for x in (*results, *values[:-1])),
        values.offsets,
        *response_sums,
        *out,
        programs=blocks.number,
        values=(
            objective.low,
            objective.high,
            objective.most,
            objective.log_most,
            correction.lower,
            correction.upper,
            options.threshold,
            options.kl_coef,
            options.entropy_coef,
            *_sizes(blocks),
        ),
        OBJECTIVE=objective.objective or None,
        LEVEL=objective.level,
        CLIP=objective.clip,
        CORRECTION=correction.correction,
        WEIGHTING=options.weighting,
        WITH_KL=options.kl_coef != 0,
        KL_ESTIMATOR=options.kl_estimator,
        **_weighing(correction),
    )
    return out


def totals(sums: Tensor, maxima: Tensor, blocks: Blocks, with_rollout: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, sums and maxima of PolicyLossMetrics)."""
    out_sums, out_maxima = sums.new_empty(NUM_SUMS), sums.new_empty(NUM_MAXIMA)
    loss = torch.empty((), dtype=torch.float32, device=sums.device)
    launch_totals(
        sums,
        maxima,
        blocks.offsets,
        loss,
        out_sums,
        out_maxima,
        programs=1,
        values=_sizes(blocks)[:3],
        WITH_ROLLOUT=with_rollout,
        ROWS=LANES.vec,
        NUM_SUMS=NUM_SUMS,
        NUM_MAXIMA=NUM_MAXIMA,
        LANES=LANES.lanes,
    )
    return loss, out_sums, out_maxima


def _weighing(options: CorrectionOptions) -> dict[str, Any]:
    """The constants of a kernel that weighs tokens by d, and the options of Triton for its float64."""
    constants = {"BEYOND": options.beyond, "WEIGHS": options.weighs}
    if torch.version.hip:
        return constants
    return {**constants, "maxnreg": 128}  # ptxas else spills, to run two programs at once


def _sizes(blocks: Blocks) -> tuple[int, int, int, int]:
    return blocks.num_responses, blocks.number, blocks.length, blocks.search_steps


def _flat(values: Tensor | None) -> Tensor | None:
    """For kernels that address a tensor as [T]."""
    if values is None:
        return None
    return values.contiguous().view(torch.uint8) if values.dtype == torch.bool else values.contiguous()
