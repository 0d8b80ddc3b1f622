"""token_logprobs on the GPU: one program per token in the forward, one per token and tile in the backward.

If a gradient narrower than the logits overwrites them, the backward has one program per token too. A program of one
tile would otherwise write to memory that another program still reads.
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
    ELSEWHERE,
    IGNORE_INDEX,
    gradient_factors,
    gradient_tile,
    logit_of_id,
    softmax_of_row,
    store_gradient_row,
)
from ...common.triton.row_tiles import fill_row, load_tile, row_offset, row_pointer, store_tile, unspecialized
from ...common.triton.sizes import cdiv
from .rows import NO_EPILOGUE, Epilogue, LogitRows, RowGradients


@unspecialized(aligned=["bias"])
def token_logprobs_fwd_kernel(
    logits,
    bias,
    token_ids,
    temperature,
    log_probs,
    entropy,
    shift,
    log_sum,
    softcap,
    L,
    V,
    stride_b,
    stride_l,
    WITH_ENTROPY: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    ALIGN: tl.constexpr,
    ONE_TILE: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    V = V // ALIGN * ALIGN
    b_id = tl.load(token_ids + i_t)
    if (b_id < 0) | (b_id >= V):
        nothing = tl.where(b_id == IGNORE_INDEX, 0.0, float("nan"))
        tl.store(log_probs + i_t, nothing)
        tl.store(shift + i_t, nothing)
        tl.store(log_sum + i_t, nothing)
        if WITH_ENTROPY:
            tl.store(entropy + i_t, nothing)
        return
    p_row = row_pointer(logits, row_offset(i_t, L, stride_b, stride_l, ALIGN), ALIGN)
    b_temperature = tl.load(temperature + i_t)
    b_logit = logit_of_id(p_row, b_id, bias, softcap)
    b_shift, b_log_sum, b_entropy, _ = softmax_of_row(p_row, V, bias, softcap, b_temperature, LANES, VEC, ONE_TILE)
    tl.store(log_probs + i_t, tl.div_rn(b_logit - b_shift, b_temperature) - b_log_sum)
    tl.store(shift + i_t, b_shift)
    tl.store(log_sum + i_t, b_log_sum)
    if WITH_ENTROPY:
        tl.store(entropy + i_t, b_entropy)


@unspecialized(aligned=["bias"])
def token_logprobs_bwd_kernel(
    logits,
    bias,
    token_ids,
    temperature,
    shift,
    log_sum,
    entropy,
    grad_log_probs,
    grad_entropy,
    out,
    softcap,
    L,
    V,
    stride_b,
    stride_l,
    out_stride_b,
    out_stride_l,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    ALIGN: tl.constexpr,
    ONE_TILE: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    V = V // ALIGN * ALIGN
    i_tile = tl.program_id(1)
    BY_ROW: tl.constexpr = out.dtype.element_ty != logits.dtype.element_ty
    p_out = row_pointer(out, row_offset(i_t, L, out_stride_b, out_stride_l, ALIGN), ALIGN)
    b_id = tl.load(token_ids + i_t)
    b_c = tl.load(grad_log_probs + i_t)
    b_e = 0.0
    b_entropy = 0.0
    if grad_entropy is not None:
        b_e = tl.load(grad_entropy + i_t)
        b_entropy = tl.load(entropy + i_t)
    # without shards ELSEWHERE is an id out of range: the NaN that the forward left in log_sum makes the gradient NaN
    if (b_id < ELSEWHERE) | (b_id >= V) | ((b_c == 0) & (b_e == 0)):
        nothing = tl.where((b_id == IGNORE_INDEX) | ((b_id >= ELSEWHERE) & (b_id < V)), 0.0, float("nan"))
        if BY_ROW:
            fill_row(p_out, nothing, V, LANES, VEC)
        else:
            store_tile(p_out, tl.full([LANES, VEC], nothing, tl.float32), i_tile, V, LANES, VEC)
        return
    b_temperature = tl.load(temperature + i_t)
    b_log_sum = tl.load(log_sum + i_t)
    k0, k1, at_id = gradient_factors(b_c, b_e, b_log_sum, b_entropy, b_temperature)
    b_shift = tl.load(shift + i_t)
    p_row = row_pointer(logits, row_offset(i_t, L, stride_b, stride_l, ALIGN), ALIGN)
    b_x = load_tile(p_row, i_tile, V, LANES, VEC)
    c = LOG2E / b_temperature
    if BY_ROW:
        store_gradient_row(b_x, p_row, p_out, V, bias, softcap, b_id, b_shift, c, k0, k1, at_id, LANES, VEC, ONE_TILE)
    else:
        b_grad = gradient_tile(b_x, i_tile, V, bias, softcap, b_id, b_shift, c, k0, k1, at_id, LANES, VEC)
        store_tile(p_out, b_grad, i_tile, V, LANES, VEC)


def forward(rows: LogitRows, with_entropy: bool, epilogue: Epilogue = NO_EPILOGUE) -> tuple[Tensor, ...]:
    """(log_probs, entropy or empty, shift, log_sum), each of token_ids' shape, from the output of the epilogue."""
    logits, token_ids, temperature = rows
    log_probs, shift, log_sum = (torch.empty_like(temperature) for _ in range(3))
    entropy = torch.empty_like(temperature) if with_entropy else temperature.new_empty(0)
    results = log_probs, entropy, shift, log_sum
    logits = aligned(logits, forward_config(logits.shape[-1], logits.dtype).vec)
    bias = aligned_vector(epilogue.bias)
    _forward(logits, bias, token_ids, temperature, *results, softcap=epilogue.softcap or None)
    return results


@prepared
def _forward(logits: Tensor, *tensors: Tensor | None, softcap: float | None) -> Launch:
    entropy: Any = tensors[4]
    config = forward_config(logits.shape[-1], logits.dtype)
    return over_rows(
        token_logprobs_fwd_kernel,
        (logits.shape[:-1].numel(),),
        softcap,
        *sizes_of(logits),
        WITH_ENTROPY=entropy.numel() > 0,
        ONE_TILE=logits.shape[-1] <= config.tile,
        config=config,
        rows=(logits,),
    )


def backward(rows: LogitRows, gradients: RowGradients, out: Tensor, epilogue: Epilogue = NO_EPILOGUE) -> None:
    """Write the gradient by the input of the epilogue, rows.logits, into `out`.

    out: may be the logits, or 16-bit memory in which each row begins at the address of its float32 row of logits.
    """
    vocab_size = rows.logits.shape[-1]
    config = backward_config(vocab_size, rows.logits.dtype, out.dtype)
    logits, grad = aligned(rows.logits, config.vec), memory_for(out, config.vec)
    tensors = logits, aligned_vector(epilogue.bias), rows.token_ids, rows.temperature, *gradients, grad
    _backward(*tensors, softcap=epilogue.softcap or None)
    if grad is not out:
        out.copy_(grad)


@prepared
def _backward(logits: Tensor, *tensors: Tensor | None, softcap: float | None) -> Launch:
    grad: Any = tensors[-1]
    vocab_size = logits.shape[-1]
    config = backward_config(vocab_size, logits.dtype, grad.dtype)
    tiles = 1 if grad.dtype != logits.dtype else cdiv(vocab_size, config.tile)
    return over_rows(
        token_logprobs_bwd_kernel,
        (logits.shape[:-1].numel(), tiles),
        softcap,
        *sizes_of(logits, grad),
        ONE_TILE=vocab_size <= config.tile,
        config=config,
        rows=(logits, grad),
    )


def forward_config(vocab_size: int, dtype: torch.dtype) -> LaunchConfig:
    """512 threads with two accesses each, and two more in flight for the next tile, so a few programs fill a processor.

    Rows that do not allow 128-bit accesses need more registers per logit, so a thread takes half as many.
    """
    per_thread = (32 if is_whole(vocab_size, dtype) else 16) // dtype.itemsize
    return make_config(vocab_size, dtype, threads=512, per_thread=per_thread)


def backward_config(vocab_size: int, dtype: torch.dtype, out_dtype: torch.dtype | None = None) -> LaunchConfig:
    """The backward has no sums, so a program is one small tile, and a row has many. If a program is a whole row, it has
    twice the threads, to keep more of the row in flight. Rows that do not allow 128-bit accesses need more registers
    per logit, as in the forward."""
    if out_dtype is None or out_dtype == dtype:
        return make_config(vocab_size, dtype, threads=256, per_thread=32 // dtype.itemsize)
    per_thread = 8 if is_whole(vocab_size, out_dtype) else 4
    return make_config(vocab_size, out_dtype, threads=512, per_thread=per_thread)
