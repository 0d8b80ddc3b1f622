"""Batches for the tests of the ops in both layouts, and the rule for the largest error of a result."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import equations
import torch

from minirl_kernels import PolicyLossConfig
from minirl_kernels.backends import native

# SLACK: the permitted error of a float32 result beyond the eager path's, relative to its largest value. A
# log-probability of about -8, correctly rounded to float32, is off by up to 2**-21, and so is exp of it.
SLACK = 2.0**-20
LENGTHS = [5, 1, 4, 9, 3, 7]  # of the responses in a batch
PRESETS = ("minirl", "reinforce", "sequence_is", "grpo", "cispo", "gspo")
TOKEN_LEVEL = ("minirl", "reinforce", "grpo", "cispo")  # the presets whose objective is computed token by token


def every_config(**options):
    """Each preset with every rollout_is, truncation and clip that it allows."""
    for preset, rollout_is, threshold, clip in itertools.product(
        PRESETS, ("token", "sequence", None), (5.0, None), (True, False)
    ):
        corrections = {"rollout_is": rollout_is, "rollout_is_threshold": threshold, "clip": clip}
        try:
            config = PolicyLossConfig.preset(preset, **corrections, **options)
        except ValueError:
            continue
        yield config


def tables_of_one_order(dtype: torch.dtype) -> list[str]:
    """The instruction sets of this machine whose matmuls give the same bits."""
    others = {"baseline", "amx"} if dtype == torch.bfloat16 else {"baseline"}
    return [isa for isa in native().isa_supported() if isa not in others]


@dataclass
class Batch:
    """Consecutive responses: [T] per token, [B] per response. It has `log_probs`, or `logits` with `token_ids`."""

    lengths: list[int]
    old_log_probs: torch.Tensor | None
    rollout_log_probs: torch.Tensor | None
    ref_log_probs: torch.Tensor | None
    advantages: torch.Tensor  # [B] or [T]
    loss_mask: torch.Tensor
    group_ids: torch.Tensor
    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    token_ids: torch.Tensor | None = None

    def spans(self) -> list[tuple[int, int]]:
        ends = torch.tensor(self.lengths).cumsum(0).tolist()
        return [(end - length, end) for end, length in zip(ends, self.lengths, strict=True)]

    def token_advantages(self) -> torch.Tensor:
        if len(self.advantages) != len(self.lengths):
            return self.advantages
        return torch.cat([a.expand(n) for a, n in zip(self.advantages, self.lengths, strict=True)])

    def responses(self, first: int, last: int) -> Batch:
        """A micro-batch: responses first .. last - 1."""
        tokens = slice(sum(self.lengths[:first]), sum(self.lengths[:last]))
        per_response = {"lengths", "group_ids", *(["advantages"] if len(self.advantages) == len(self.lengths) else [])}
        parts = {
            name: None if values is None else values[slice(first, last) if name in per_response else tokens]
            for name, values in vars(self).items()
        }
        return replace(self, **parts)

    def arguments(self, layout: str) -> dict:
        """The keyword arguments that policy_loss and its fused form share. Their padding holds poison."""
        out = {
            name: self.lay_out(getattr(self, name), layout)
            for name in ("old_log_probs", "rollout_log_probs", "ref_log_probs", "loss_mask")
        }
        per_token = len(self.advantages) != len(self.lengths)
        out["advantages"] = self.lay_out(self.advantages, layout) if per_token else self.advantages
        out["group_ids"] = self.group_ids
        if layout == "packed":
            out["cu_seqlens"] = torch.tensor([0, *(end for _, end in self.spans())], dtype=torch.int32)
        return out

    def lay_out(self, values: torch.Tensor | None, layout: str) -> torch.Tensor | None:
        """[T, ...] unchanged, or as [B, L, ...] whose padding holds values that must never be read."""
        if values is None or layout == "packed":
            return values
        poison = {torch.bool: False, torch.int32: 1 << 30, torch.int64: 1 << 40}.get(values.dtype, math.nan)
        width = max(self.lengths, default=0) + 1
        out = values.new_full((len(self.lengths), width, *values.shape[1:]), poison)
        for row, (start, end) in enumerate(self.spans()):
            out[row, : end - start] = values[start:end]
        return out

    def pack(self, values: torch.Tensor, layout: str) -> torch.Tensor:
        """[T, ...] from the result of lay_out, or from another tensor in that layout."""
        if layout == "packed":
            return values
        return torch.cat([values[row, :length] for row, length in enumerate(self.lengths)] or [values.flatten(0, 1)])


def random_rows(shape, vocab_size, dtype=torch.float32, seed=0):
    """(logits [*shape, V], token ids [*shape])"""
    gen = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(*shape, vocab_size, generator=gen)).to(dtype)
    return logits, torch.randint(vocab_size, shape, generator=gen)


def random_batch(lengths, *, vocab_size=None, dtype=torch.float32, seed=0, spread=0.3) -> Batch:
    """A batch with advantages of both signs, a mask with holes, and one response that is wholly masked.

    spread: the standard deviation of log-ratios between the log-probabilities.
    """
    gen = torch.Generator().manual_seed(seed)
    size, num_responses = sum(lengths), len(lengths)

    def normal(*shape):
        return torch.randn(shape, generator=gen)

    logits = token_ids = None
    if vocab_size is None:
        log_probs = -normal(size).abs() - 0.1
    else:
        logits = (2 * normal(size, vocab_size)).to(dtype)
        token_ids = torch.randint(vocab_size, (size,), generator=gen)
        log_probs = equations.token_log_probs(logits.double(), token_ids)[0].float()
    loss_mask = torch.rand(size, generator=gen) < 0.8
    if num_responses > 2:
        start = sum(lengths[:2])
        loss_mask[start : start + lengths[2]] = False
    return Batch(
        lengths=list(lengths),
        old_log_probs=log_probs + spread * normal(size),
        rollout_log_probs=log_probs + spread * normal(size),
        ref_log_probs=log_probs + spread * normal(size),
        advantages=normal(num_responses),
        loss_mask=loss_mask,
        group_ids=torch.arange(num_responses) % 2,  # interleaved
        log_probs=None if vocab_size else log_probs,
        entropy=None if vocab_size else normal(size).abs(),
        logits=logits,
        token_ids=token_ids,
    )


def batch_at_bounds(config, *, vocab_size=None, dtype=torch.float32) -> Batch:
    """Responses of two tokens, one for every combination of values around the bounds.

    r lies on either side of each bound, and between them. The weight lies on either side of the truncation; the weight
    is w or d, per token or per response. The advantage is negative, zero or positive.
    """
    step = 2.0**-8  # more than the error of float32 log-probabilities
    threshold = math.log(config.rollout_is_threshold or 5.0)
    log_low, log_high = math.log1p(-config.clip_ratio_low), math.log1p(config.clip_ratio_high)
    # the bounds of GSPO are closer together than the step
    step = min(step, (log_high - log_low) / 4)
    rows = [
        (log_r, (weight - of_w * log_r) / tokens, sign)
        for log_r in (log_low - step, log_low + step, 0.0, log_high - step, log_high + step)
        for weight in (threshold - 2.0**-8, threshold + 2.0**-8)
        for of_w in (0, 1)
        for tokens in (1, 2)
        for sign in (-1.25, 0.0, 0.75)
    ]
    log_r, log_d, signs = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
    batch = random_batch([2] * len(rows), vocab_size=vocab_size, dtype=dtype)
    if vocab_size is None:
        log_probs = batch.log_probs.double()
    else:
        log_probs = equations.token_log_probs(batch.logits.double(), batch.token_ids)[0]
    old = log_probs - log_r.repeat_interleave(2)
    return replace(
        batch,
        old_log_probs=old.float(),
        rollout_log_probs=(old - log_d.repeat_interleave(2)).float(),
        advantages=signs.float(),
        loss_mask=torch.ones_like(batch.loss_mask),
    )


def assert_as_exact_as_eager(actual, eager, exact, scale=None) -> None:
    """The largest error of `actual` against float64 is at most the eager path's in the same dtype, plus SLACK.

    Errors are in units of `scale`, by default the largest exact value. Where the scale is 0, the result must be 0.
    """
    assert actual.dtype == eager.dtype
    assert actual.shape == exact.shape == eager.shape
    if not exact.numel():
        return
    exact = exact.double()
    scale = exact.abs().max() if scale is None else scale.double()
    assert bool((actual == 0).where(scale == 0, True).all())
    errors = [
        ((values.double() - exact) / scale.where(scale > 0, 1.0)).abs().max().item() for values in (actual, eager)
    ]
    assert errors[0] <= errors[1] + SLACK, f"{errors[0]:.3g} of the scale off, the eager path {errors[1]:.3g}"


def assert_same_bits(actual, expected) -> None:
    """Two sequences of tensors are equal in dtype and in every bit."""
    for values, right in zip(actual, expected, strict=True):
        assert values.dtype == right.dtype
        assert torch.equal(values, right)


def per_row(gradient) -> torch.Tensor:
    """The scale of each row's errors: the row's largest value, so that rows of small gradients count too."""
    return gradient.abs().amax(-1, keepdim=True) if gradient.numel() else gradient.sum(-1, keepdim=True)


def per_row_of_terms(weights, upstream) -> torch.Tensor:
    """The scale of the gradient by the logits, for routing weights [T, K].

    It is the row's largest weight_i upstream_i: the gradient is a difference of such terms.
    """
    return (weights.double() * upstream).abs().amax(-1, keepdim=True)
