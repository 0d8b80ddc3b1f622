"""token_logprobs on the GPU: one program per token forward, one per token and tile backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton_tiles import (
    IGNORE_INDEX,
    LOG2E,
    SIZES,
    LaunchConfig,
    gradient_factors,
    gradient_tile,
    is_whole,
    launch,
    load_tile,
    make_config,
    row_offset,
    row_strides,
    softmax_of_row,
    store_tile,
)


@triton.jit(do_not_specialize=SIZES)
def token_logprobs_fwd_kernel(
    logits,
    token_ids,
    temperature,
    log_probs,
    entropy,
    shift,
    log_sum,
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
    p_row = logits + row_offset(i_t, L, stride_b, stride_l, ALIGN)
    b_temperature = tl.load(temperature + i_t)
    b_logit = tl.load(p_row + b_id).to(tl.float32)
    b_shift, b_log_sum, b_entropy, _ = softmax_of_row(p_row, V, b_temperature, LANES, VEC, ONE_TILE)
    tl.store(log_probs + i_t, tl.div_rn(b_logit - b_shift, b_temperature) - b_log_sum)
    tl.store(shift + i_t, b_shift)
    tl.store(log_sum + i_t, b_log_sum)
    if WITH_ENTROPY:
        tl.store(entropy + i_t, b_entropy)


@triton.jit(do_not_specialize=SIZES)
def token_logprobs_bwd_kernel(
    logits,
    token_ids,
    temperature,
    shift,
    log_sum,
    entropy,
    grad_log_probs,
    grad_entropy,
    out,
    L,
    V,
    stride_b,
    stride_l,
    out_stride_b,
    out_stride_l,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    ALIGN: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    V = V // ALIGN * ALIGN
    i_tile = tl.program_id(1)
    p_out = out + row_offset(i_t, L, out_stride_b, out_stride_l, ALIGN)
    b_id = tl.load(token_ids + i_t)
    b_c = tl.load(grad_log_probs + i_t)
    b_e = 0.0
    b_entropy = 0.0
    if grad_entropy is not None:
        b_e = tl.load(grad_entropy + i_t)
        b_entropy = tl.load(entropy + i_t)
    if (b_id < 0) | (b_id >= V) | ((b_c == 0) & (b_e == 0)):
        nothing = tl.where((b_id == IGNORE_INDEX) | ((b_id >= 0) & (b_id < V)), 0.0, float("nan"))
        store_tile(p_out, tl.full([LANES, VEC], nothing, tl.float32), i_tile, V, LANES, VEC)
        return
    b_temperature = tl.load(temperature + i_t)
    b_log_sum = tl.load(log_sum + i_t)
    k0, k1, at_id = gradient_factors(b_c, b_e, b_log_sum, b_entropy, b_temperature)
    b_shift = tl.load(shift + i_t)
    b_x = load_tile(logits + row_offset(i_t, L, stride_b, stride_l, ALIGN), i_tile, V, LANES, VEC)
    c = LOG2E / b_temperature
    b_grad = gradient_tile(b_x, i_tile, b_id, b_shift, c, k0, k1, at_id, LANES, VEC)
    store_tile(p_out, b_grad, i_tile, V, LANES, VEC)


def forward(logits: Tensor, token_ids: Tensor, temperature: Tensor, with_entropy: bool) -> tuple[Tensor, ...]:
    """(log_probs, entropy or empty, shift, log_sum), each of token_ids' shape."""
    log_probs, shift, log_sum = (torch.empty_like(temperature) for _ in range(3))
    entropy = torch.empty_like(temperature) if with_entropy else temperature.new_empty(0)
    vocab_size = logits.shape[-1]
    config = forward_config(vocab_size, logits.dtype)
    length, *strides = row_strides(logits)
    launch(
        token_logprobs_fwd_kernel,
        (token_ids.numel(),),
        logits,
        token_ids,
        temperature,
        log_probs,
        entropy,
        shift,
        log_sum,
        length,
        vocab_size,
        *strides,
        WITH_ENTROPY=with_entropy,
        ONE_TILE=vocab_size <= config.tile,
        config=config,
        rows=(logits,),
    )
    return log_probs, entropy, shift, log_sum


def backward(
    logits: Tensor,
    token_ids: Tensor,
    temperature: Tensor,
    shift: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    grad_log_probs: Tensor,
    grad_entropy: Tensor | None,
    out: Tensor,
) -> None:
    """d logits into `out`, which may be `logits` itself."""
    vocab_size = logits.shape[-1]
    config = backward_config(vocab_size, logits.dtype)
    length, *strides = row_strides(logits)
    _, *out_strides = row_strides(out)
    launch(
        token_logprobs_bwd_kernel,
        (token_ids.numel(), triton.cdiv(vocab_size, config.tile)),
        logits,
        token_ids,
        temperature,
        shift,
        log_sum,
        entropy,
        grad_log_probs,
        grad_entropy,
        out,
        length,
        vocab_size,
        *strides,
        *out_strides,
        config=config,
        rows=(logits, out),
    )


def forward_config(vocab_size: int, dtype: torch.dtype) -> LaunchConfig:
    """512 threads with two accesses each, and as many in flight for the next tile: a few programs fill a processor.
    One logit at a time, where rows are not whole accesses, takes more registers: half as many then."""
    per_thread = (32 if is_whole(vocab_size, dtype) else 16) // dtype.itemsize
    return make_config(vocab_size, dtype, threads=512, per_thread=per_thread)


def backward_config(vocab_size: int, dtype: torch.dtype) -> LaunchConfig:
    """Nothing is reduced, so a program is one tile, small enough that a row makes many."""
    return make_config(vocab_size, dtype, threads=256, per_thread=32 // dtype.itemsize)
