"""For the tests of the ops: batches in both layouts, and the rule of how far off a result may be."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import equations
import torch

from minirl_kernels import PolicyLossConfig
from minirl_kernels.backends import native

# What a float32 result may be off beyond the eager path, of its largest value: a float32 log-probability of -8 that is
# rounded correctly is off by 2**-21 itself, and so is exp of it.
SLACK = 2.0**-20
LENGTHS = [5, 1, 4, 9, 3, 7]  # of the responses of a batch
PRESETS = ("minirl", "reinforce", "sequence_is", "grpo", "cispo", "gspo")
TOKEN_LEVEL = ("minirl", "reinforce", "grpo", "cispo")  # the presets that look at one token at a time


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
    """The instruction sets that run here whose matmuls have the same bits."""
    others = {"baseline", "amx"} if dtype == torch.bfloat16 else {"baseline"}
    return [isa for isa in native().isa_supported() if isa not in others]


@dataclass
class Batch:
    """Responses one after another: [T] per token, [B] per response. `log_probs` or `logits` with `token_ids`."""

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
        """The part of the batch that a micro-batch of responses first .. last - 1 is."""
        tokens = slice(sum(self.lengths[:first]), sum(self.lengths[:last]))
        per_response = {"lengths", "group_ids", *(["advantages"] if len(self.advantages) == len(self.lengths) else [])}
        parts = {
            name: None if values is None else values[slice(first, last) if name in per_response else tokens]
            for name, values in vars(self).items()
        }
        return replace(self, **parts)

    def arguments(self, layout: str) -> dict:
        """The keyword arguments that policy_loss and its fused form share, with poison in the padding."""
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
        """[T, ...] as it is, or as [B, L, ...]: what stands in the padding must never be looked at."""
        if values is None or layout == "packed":
            return values
        poison = {torch.bool: False, torch.int32: 1 << 30, torch.int64: 1 << 40}.get(values.dtype, math.nan)
        width = max(self.lengths, default=0) + 1
        out = values.new_full((len(self.lengths), width, *values.shape[1:]), poison)
        for row, (start, end) in enumerate(self.spans()):
            out[row, : end - start] = values[start:end]
        return out

    def pack(self, values: torch.Tensor, layout: str) -> torch.Tensor:
        """What lay_out made, or a result of its shape, as [T, ...] again."""
        if layout == "packed":
            return values
        return torch.cat([values[row, :length] for row, length in enumerate(self.lengths)] or [values.flatten(0, 1)])


def random_rows(shape, vocab_size, dtype=torch.float32, seed=0):
    """(logits [*shape, V], token ids of that shape)"""
    gen = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(*shape, vocab_size, generator=gen)).to(dtype)
    return logits, torch.randint(vocab_size, shape, generator=gen)


def random_batch(lengths, *, vocab_size=None, dtype=torch.float32, seed=0, spread=0.3) -> Batch:
    """log r and log d of some `spread`, both signs of advantage, a mask with holes, a response wholly masked."""
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
    """One response of two tokens for every combination of: r on either side of each bound and between them, the
    weight on either side of the truncation (whichever of w and d it is of, per token or per response), and the
    sign of the advantage."""
    step = 2.0**-8  # wide enough for what float32 log-probabilities carry of error
    threshold = math.log(config.rollout_is_threshold or 5.0)
    log_low, log_high = math.log1p(-config.clip_ratio_low), math.log1p(config.clip_ratio_high)
    # GSPO's own bounds are closer together than the step
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
    """The largest error of `actual` against float64 is at most that of the eager path in the same dtype, plus SLACK.

    Errors are in units of `scale`: the largest value unless given. Where the scale is 0, so is the result.
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
    """The scale that makes a row of small gradients count like any other."""
    return gradient.abs().amax(-1, keepdim=True) if gradient.numel() else gradient.sum(-1, keepdim=True)


def per_row_of_terms(weights, upstream) -> torch.Tensor:
    """The scale of the gradient of routing weights [T, K]: a row's largest weight_i upstream_i, of which it is made
    by subtraction."""
    return (weights.double() * upstream).abs().amax(-1, keepdim=True)
