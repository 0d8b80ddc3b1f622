"""The objectives and the KL estimators of a token in Triton, in the float dtype of their arguments.

The row kernel of fused_policy_loss calls them in float32, and the kernel of policy_loss in float64.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def times(weight, factor):
    """weight * factor, and 0 where one of them is 0, even if the other is infinite. A NaN stays NaN."""
    nothing = ((factor == 0) & (weight == weight)) | ((weight == 0) & (factor == factor))
    return tl.where(nothing, 0.0, weight * factor)


@triton.jit
def times_exp(factor, x):
    """times(exp(x), factor). A large x is split in halves, so that the result overflows only if the product does."""
    half = tl.exp(0.5 * x)
    product = tl.where(x > 80, factor * half * half, factor * tl.exp(x))
    return tl.where((factor == 0) & (x == x), 0.0, product)


@triton.jit
def at_most(x, bound):
    return tl.minimum(x, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def at_least(x, bound):
    return tl.maximum(x, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def log_or_less(x):
    """log(x), and -inf at 0."""
    return tl.where(x == 0, -float("inf"), tl.log(tl.where(x == 0, 1.0, x)))


@triton.jit
def exp_minus_one_minus(x):
    """exp(x) - 1 - x, by its series for small x, where the difference would lose its digits."""
    series = 1 / 362880
    series = series * x + 1 / 40320
    series = series * x + 1 / 5040
    series = series * x + 1 / 720
    series = series * x + 1 / 120
    series = series * x + 1 / 24
    series = series * x + 1 / 6
    series = series * x + 1 / 2
    return tl.where(tl.abs(x) < 0.5, series * x * x, tl.exp(x) - 1 - x)


@triton.jit
def bounds_met(
    log_prob, log_r, log_w, advantage, low, high, most, log_most, OBJECTIVE: tl.constexpr, CLIP: tl.constexpr
):
    """(upper, lower): `bounds_met` of the objective, whether a bound changes the gradient."""
    above = (log_r != log_r) & (log_r == log_r)  # False everywhere
    below = above
    if OBJECTIVE == "dppo_tv" or OBJECTIVE == "dppo_kl":
        p, q = tl.exp(log_prob), tl.exp(log_prob - log_w)
        gap = tl.abs(p - q)
        if OBJECTIVE == "dppo_kl":
            # the rounding of 1 - q is below the rounding of the sum
            gap = times(q, -log_w) + times(1 - q, log_or_less(1 - q) - log_or_less(1 - p))
        above = (advantage > 0) & (p > q) & (gap > high)
        below = (advantage < 0) & (p < q) & (gap > low)
    elif CLIP:
        r = tl.exp(log_r)
        above, below = r > high, r < low
        if OBJECTIVE != "cispo":
            above, below = above & (advantage > 0), below & (advantage < 0)
        if OBJECTIVE == "two_sided":
            above |= (r > tl.minimum(most, tl.exp(log_most))) & (advantage < 0)
            below |= (log_r < -log_most) & (advantage > 0)
    return above, below


@triton.jit
def token_objective(
    log_prob,
    log_r,
    log_w,
    log_d,
    advantage,
    low,
    high,
    most,
    log_most,
    threshold,
    OBJECTIVE: tl.constexpr,
    CLIP: tl.constexpr,
):
    """(loss, d loss / d log_prob) of a token; `ops/policy_loss/reference.py` is its reference.

    Both are linear in the advantage, so advantage * (weight of the token) gives the token's share of the loss.
    low, high, most, log_most, CLIP: the fields of ObjectiveOptions. The caller multiplies the results of "sapo" and
    "two_sided" by d.
    """
    above, below = bounds_met(log_prob, log_r, log_w, advantage, low, high, most, log_most, OBJECTIVE, CLIP)
    bounded = above | below
    if OBJECTIVE == "minirl" or OBJECTIVE == "reinforce" or OBJECTIVE == "dppo_tv" or OBJECTIVE == "dppo_kl":
        truncated = tl.exp(log_w) > threshold
        factor = tl.where(bounded, 0.0, -advantage) * tl.where(truncated, threshold, 1.0)
        grad = times_exp(factor, tl.where(truncated, 0.0, log_w))
        loss = grad if OBJECTIVE == "reinforce" else times(log_prob, grad)
    elif OBJECTIVE == "grpo" or OBJECTIVE == "cispo":
        truncated = tl.exp(log_d) > threshold
        bound = at_most(at_least(tl.exp(log_r), low), high)
        factor = -advantage * tl.where(truncated, threshold, 1.0) * tl.where(bounded, bound, 1.0)
        term = times_exp(factor, tl.where(truncated, 0.0, log_d) + tl.where(bounded, 0.0, log_r))
        if OBJECTIVE == "cispo":
            loss, grad = times(log_prob, term), term
        else:
            loss, grad = term, tl.where(bounded, 0.0, term)
    elif OBJECTIVE == "sapo":
        tau = tl.where(advantage > 0, high, low).to(log_r.dtype)
        r = tl.exp(log_r)
        at_r, above_r = sigmoid(tau * (r - 1)), sigmoid(tau * (1 - r))
        loss, grad = -4 / tau * at_r * advantage, times(-times(4 * at_r * above_r, r), advantage)
    else:
        tl.static_assert(OBJECTIVE == "two_sided")
        r = tl.exp(at_most(at_least(log_r, -log_most), log_most))
        r = tl.where(advantage < 0, at_most(at_least(r, low), most), at_most(r, high))
        loss = times(-r, advantage)
        grad = tl.where(bounded, 0.0, loss)
    return loss, grad


@triton.jit
def kl_penalty(coef, log_prob, ref_log_prob, ESTIMATOR: tl.constexpr):
    """coef * (estimate of KL(pi_theta || pi_ref), its derivative by log_prob)."""
    log_ratio = ref_log_prob - log_prob
    if ESTIMATOR == "k1":
        kl, grad = coef * -log_ratio, coef
    elif ESTIMATOR == "k2":
        kl, grad = coef * 0.5 * log_ratio * log_ratio, coef * -log_ratio
    else:
        tl.static_assert(ESTIMATOR == "k3")
        unscaled = exp_minus_one_minus(log_ratio)
        large = times_exp(coef, log_ratio)  # the other terms are below its rounding error
        kl = tl.where(log_ratio > 80, large, coef * unscaled)
        grad = tl.where(log_ratio > 80, -large, coef * -(unscaled + log_ratio))
    return kl, grad
