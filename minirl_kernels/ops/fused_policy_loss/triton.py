"""fused_policy_loss on the GPU: one program per token, from its logits to its loss and the gradient of its logits.

A row that fits in one tile is read once. A longer row is read twice, in opposite directions. The second reading starts
with the tile that is still in registers. Its next tiles are the ones most likely to be still in the caches.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ...common.triton.alignment import aligned, aligned_vector, memory_for
from ...common.triton.config import LaunchConfig, is_whole, make_config, sizes_of
from ...common.triton.launch import Launch, over_rows, prepared
from ...common.triton.numbers import LOG2E
from ...common.triton.row_softmax import (
    IGNORE_INDEX,
    barrier_if_narrower,
    gradient_factors,
    logit_of_id,
    softmax_of_row,
    store_gradient_row,
)
from ...common.triton.row_tiles import fill_row, row_offset, row_pointer, unspecialized
from ..policy_loss.kernels_objective import kl_penalty, token_objective
from ..token_logprobs.rows import NO_EPILOGUE, Epilogue, LogitRows
from .loss_rows import LossRows


@unspecialized(aligned=["bias"])
def fused_policy_loss_kernel(
    logits,
    bias,
    token_ids,
    temperature,
    old_log_probs,
    behaviour_log_probs,
    ref_log_probs,
    advantages,
    weights,
    log_probs,
    entropy,
    token_loss,
    token_grad,
    out,
    softcap,
    ratio_low,
    ratio_high,
    threshold,
    kl_coef,
    entropy_coef,
    L,
    V,
    stride_b,
    stride_l,
    out_stride_b,
    out_stride_l,
    OBJECTIVE: tl.constexpr,
    CLIP: tl.constexpr,
    KL_ESTIMATOR: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    ALIGN: tl.constexpr,
    ONE_TILE: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    V = V // ALIGN * ALIGN
    p_out = row_pointer(out, row_offset(i_t, L, out_stride_b, out_stride_l, ALIGN), ALIGN)
    b_id = tl.load(token_ids + i_t)
    if (b_id < 0) | (b_id >= V):
        nothing = tl.where(b_id == IGNORE_INDEX, 0.0, float("nan"))
        tl.store(log_probs + i_t, nothing)
        tl.store(entropy + i_t, nothing)
        tl.store(token_loss + i_t, nothing)
        tl.store(token_grad + i_t, nothing)
        fill_row(p_out, nothing, V, LANES, VEC)
        return

    p_row = row_pointer(logits, row_offset(i_t, L, stride_b, stride_l, ALIGN), ALIGN)
    b_temperature = tl.load(temperature + i_t)
    # the gradient may overwrite the row: the barriers of the row's sums order this load before the first store
    b_logit = logit_of_id(p_row, b_id, bias, softcap)
    b_shift, b_log_sum, b_entropy, b_x = softmax_of_row(p_row, V, bias, softcap, b_temperature, LANES, VEC, ONE_TILE)
    b_log_prob = tl.div_rn(b_logit - b_shift, b_temperature) - b_log_sum

    b_old = b_log_prob
    if old_log_probs is not None:
        b_old = tl.load(old_log_probs + i_t)
    b_behaviour = b_old
    if behaviour_log_probs is not None:
        b_behaviour = tl.load(behaviour_log_probs + i_t)
    b_weight = tl.load(weights + i_t)
    b_loss, b_c = token_objective(
        b_log_prob,
        b_log_prob - b_old,
        b_log_prob - b_behaviour,
        b_old - b_behaviour,
        b_weight * tl.load(advantages + i_t),
        ratio_low,
        ratio_high,
        0.0,
        0.0,
        threshold,
        OBJECTIVE,
        CLIP,
    )
    if ref_log_probs is not None:
        b_kl, b_kl_grad = kl_penalty(b_weight * kl_coef, b_log_prob, tl.load(ref_log_probs + i_t), KL_ESTIMATOR)
        b_loss += b_kl
        b_c += b_kl_grad
    # an overflow gives NaN, because infinities of both signs would spread over the row
    b_fits = (tl.abs(b_loss) < float("inf")) & (tl.abs(b_c) < float("inf"))
    b_loss, b_c = tl.where(b_fits, b_loss, float("nan")), tl.where(b_fits, b_c, float("nan"))
    b_e = -entropy_coef * b_weight
    tl.store(log_probs + i_t, b_log_prob)
    tl.store(entropy + i_t, b_entropy)
    tl.store(token_loss + i_t, b_loss)
    tl.store(token_grad + i_t, b_c)

    if (b_c == 0) & (b_e == 0):
        barrier_if_narrower(p_out, p_row)
        fill_row(p_out, 0.0, V, LANES, VEC)
        return
    c = LOG2E / b_temperature
    k0, k1, at_id = gradient_factors(b_c, b_e, b_log_sum, b_entropy, b_temperature)
    store_gradient_row(b_x, p_row, p_out, V, bias, softcap, b_id, b_shift, c, k0, k1, at_id, LANES, VEC, ONE_TILE)


def forward_backward(
    rows: LogitRows, loss: LossRows, out: Tensor, epilogue: Epilogue = NO_EPILOGUE
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log_probs, entropy, token_loss, token_grad); writes the gradient into `out`.

    out: may be the logits, or 16-bit memory in which each row begins at the address of its float32 row of logits.
    The loss is computed from the output of the epilogue. The gradient is by the input of the epilogue, rows.logits.
    """
    results = tuple(torch.empty_like(rows.temperature) for _ in range(4))
    config = launch_config(rows.logits.shape[-1], rows.logits.dtype, out.dtype)
    logits, grad = aligned(rows.logits, config.vec), memory_for(out, config.vec)
    _forward_backward(
        logits,
        aligned_vector(epilogue.bias),
        rows.token_ids,
        rows.temperature,
        *loss.tensors,
        *results,
        grad,
        softcap=epilogue.softcap or None,
        options=loss.options,
    )
    if grad is not out:
        out.copy_(grad)
    return results


@prepared
def _forward_backward(logits: Tensor, *tensors: Tensor | None, softcap: float | None, options: tuple) -> Launch:
    grad: Any = tensors[-1]
    objective, clip, ratio_low, ratio_high, threshold, kl_coef, kl_estimator, entropy_coef = options
    config = launch_config(logits.shape[-1], logits.dtype, grad.dtype)
    numbers = softcap, ratio_low, ratio_high, threshold, kl_coef, entropy_coef
    return over_rows(
        fused_policy_loss_kernel,
        (logits.shape[:-1].numel(),),
        *numbers,
        *sizes_of(logits, grad),
        OBJECTIVE=objective,
        CLIP=clip,
        KL_ESTIMATOR=kl_estimator,
        ONE_TILE=logits.shape[-1] <= config.tile,
        config=config,
        rows=(logits, grad),
    )


def launch_config(vocab_size: int, dtype: torch.dtype, out_dtype: torch.dtype | None = None) -> LaunchConfig:
    """At most 1,024 threads, so that a thread has 64 registers, and no more logits per thread than fit in these.

    One tile: 16 logits per thread. 16-bit logits are packed and take half a register, so 32 fit, but not on AMD, where
    they spill. Rows that do not allow 128-bit accesses take half: every logit then needs its own address and predicate.
    """
    narrowest = out_dtype or dtype
    whole = is_whole(vocab_size, narrowest)
    one_tile = 16 if whole else 8
    if vocab_size > 1024 * one_tile and whole and dtype.itemsize == 2 and not torch.version.hip:
        one_tile = 32
    if vocab_size <= 1024 * one_tile:
        return make_config(vocab_size, narrowest, threads=1024, per_thread=one_tile)
    threads, per_thread = _many_tiles(dtype, narrowest) if whole else (1024, 4)
    return make_config(vocab_size, narrowest, threads=threads, per_thread=per_thread)


def _many_tiles(dtype: torch.dtype, narrowest: torch.dtype) -> tuple[int, int]:
    """(threads, logits per thread) for rows of many tiles. The next tile is in registers too.

    The first two were the fastest of the settings tried on an H200 with rows of 151,936 logits.
    """
    if dtype.itemsize == 2:
        return 512, 8
    return (1024, 16) if dtype == narrowest else (1024, 8)
