"""The inputs and the sums of a loss by Triton, as registered ops. `inputs.py` and `op.py` define them in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.library import register
from ...common.records import schema, unpack, with_values
from .kernel_arguments import (
    CorrectionOptions,
    InputValues,
    LossOptions,
    ResponseSums,
    TokenResults,
    TokenValues,
    WeightOptions,
)
from .layout import require_offsets
from .metric_table import COUNTS, MAXIMA, SUMS
from .objective_kernels import ObjectiveOptions


def _inputs(cu_seqlens, group_ids, shape, *arguments):
    from . import triton as kernels  # Triton may be absent

    values, options = unpack(arguments, InputValues, WeightOptions)
    device = values.advantages.device
    blocks, counts = kernels.Blocks.of(shape, cu_seqlens), kernels.Counts()
    offsets = values.advantages.new_empty(0, dtype=torch.int64)
    needs_counts = options.counts_here or options.mode in ("seq-mean-token-mean", "group-token-mean")
    if needs_counts or cu_seqlens is not None:
        group_ids = None if group_ids is None else group_ids.contiguous()
        counts, new_offsets, is_valid = kernels.count_tokens(values, blocks, group_ids, device)
        if cu_seqlens is not None:
            require_offsets(is_valid.view(torch.bool), cu_seqlens, blocks.num_tokens)
            offsets, blocks = new_offsets, with_values(blocks, offsets=new_offsets)
    results = kernels.write_inputs(values, blocks, counts, options, device=device)
    return offsets, *(values.advantages.new_empty(0) if x is None else x for x in results)


def _inputs_fake(cu_seqlens, group_ids, shape, token_ids, loss_mask, *arguments):
    old, rollout, ref, advantages = arguments[:4]
    floats = [advantages.new_empty(0 if x is None else shape, dtype=torch.float32) for x in (old, rollout, ref)]
    return (
        advantages.new_empty(0 if cu_seqlens is None else cu_seqlens.shape, dtype=torch.int64),
        advantages.new_empty(0) if token_ids is None else token_ids.new_empty(shape),
        advantages.new_empty(shape, dtype=torch.bool),
        advantages.new_empty(shape, dtype=torch.float32),
        *floats,
        advantages.new_empty(shape, dtype=torch.float32),
    )


inputs_by_kernels = register(
    f"policy_loss_inputs(Tensor? cu_seqlens, Tensor? group_ids, SymInt[] shape, {schema(InputValues, WeightOptions)})"
    " -> (Tensor offsets, Tensor token_ids, Tensor mask, Tensor weights, Tensor old_log_probs,"
    " Tensor rollout_log_probs, Tensor ref_log_probs, Tensor advantages)",
    _inputs,
    _inputs_fake,
)


def _without_ignored(token_ids, mask, weights, offsets):
    from . import triton as kernels  # Triton may be absent

    values = InputValues(token_ids, mask.view(torch.uint8), None, None, None, None)
    options = WeightOptions(None, 0.0, 1.0, "given")
    blocks = kernels.Blocks.of(mask.shape, offsets)
    return kernels.write_inputs(
        values, blocks, kernels.Counts(), options, weights=weights.contiguous(), device=mask.device
    )[:3]


without_ignored = register(
    "policy_loss_without_ignored(Tensor token_ids, Tensor mask, Tensor weights, Tensor? offsets)"
    " -> (Tensor token_ids, Tensor mask, Tensor weights)",
    _without_ignored,
    lambda token_ids, mask, weights, _: (
        torch.empty_like(token_ids, memory_format=torch.contiguous_format),
        torch.empty_like(mask, memory_format=torch.contiguous_format),
        torch.empty_like(weights, memory_format=torch.contiguous_format),
    ),
)


def _response_sums(log_probs, *arguments):
    from . import triton as kernels  # Triton may be absent

    values, options = unpack(arguments, TokenValues, CorrectionOptions)
    sums, log_mean = kernels.response_sums(log_probs, values, options)
    return sums, sums.new_empty(0) if log_mean is None else log_mean


def _response_sums_fake(log_probs, *arguments):
    from . import triton as kernels

    values, options = unpack(arguments, TokenValues, CorrectionOptions)
    number = kernels.Blocks.of(values.mask.shape, values.offsets).number
    sums = values.mask.new_empty((kernels.NUM_RESPONSE_SUMS, number), dtype=torch.float64)
    return sums, sums.new_empty(() if options.normalise else 0)


_response_sums_op = register(
    f"policy_loss_response_sums(Tensor? log_probs, {schema(TokenValues, CorrectionOptions)})"
    " -> (Tensor of_blocks, Tensor log_mean)",
    _response_sums,
    _response_sums_fake,
)


def response_sums(
    log_probs: Tensor | None, values: TokenValues, level: str, options: CorrectionOptions
) -> ResponseSums:
    """The sums that an objective of `level` and its correction need. log_probs: None if only the correction does."""
    if not options.needs_responses and (level == "token" or log_probs is None):
        return ResponseSums()
    sums, log_mean = _response_sums_op(log_probs, *values, *options)
    return ResponseSums(sums, log_mean if options.normalise else None)


def _behaviour(*arguments):
    from . import triton as kernels  # Triton may be absent

    return kernels.behaviour(*unpack(arguments, TokenValues, ResponseSums, CorrectionOptions))


behaviour_by_kernels = register(
    f"policy_loss_behaviour({schema(TokenValues, ResponseSums, CorrectionOptions)}) -> Tensor",
    _behaviour,
    lambda mask, *_: torch.empty_like(mask, dtype=torch.float32, memory_format=torch.contiguous_format),
)


def _ratios(log_probs, level, *arguments):
    from . import triton as kernels  # Triton may be absent

    values, sums, options = unpack(arguments, TokenValues, ResponseSums, CorrectionOptions)
    return kernels.ratios(log_probs, values, sums, level, options)


ratios_by_kernels = register(
    f"policy_loss_ratios(Tensor log_probs, str level, {schema(TokenValues, ResponseSums, CorrectionOptions)})"
    " -> (Tensor log_prob, Tensor log_r, Tensor log_w, Tensor log_d)",
    _ratios,
    lambda log_probs, *_: tuple(log_probs.new_empty(log_probs.shape, dtype=torch.float64) for _ in range(4)),
)


def _sums(*arguments):
    from . import triton as kernels  # Triton may be absent

    results, values, *others = unpack(arguments, *_SUMS_RECORDS)
    out = kernels.token_sums(results, values, *others)
    blocks = kernels.Blocks.of(results.log_probs.shape, values.offsets)
    loss, sums, maxima = kernels.totals(out.sums, out.maxima, blocks, values.rollout_log_probs is not None)
    return loss, sums, maxima, *(loss.new_empty(0) if x is None else x for x in out[:5])


def _sums_fake(*arguments):
    results, *_, options = unpack(arguments, *_SUMS_RECORDS)
    log_probs = results.log_probs
    needed = (True, results.entropy is not None, True, True, options.entropy_coef != 0)
    per_token = [log_probs.new_empty(log_probs.shape if x else 0, dtype=torch.float32) for x in needed]
    sums, maxima = (log_probs.new_empty(n, dtype=torch.float64) for n in (len(COUNTS) + len(SUMS), len(MAXIMA)))
    return log_probs.new_empty((), dtype=torch.float32), sums, maxima, *per_token


_SUMS_RECORDS = (TokenResults, TokenValues, ResponseSums, ObjectiveOptions, CorrectionOptions, LossOptions)
sums_by_kernels = register(
    f"policy_loss_sums({schema(*_SUMS_RECORDS)}) -> (Tensor loss, Tensor sums, Tensor maxima,"
    " Tensor log_probs, Tensor entropy, Tensor token_loss, Tensor token_grad, Tensor entropy_grad)",
    _sums,
    _sums_fake,
)
