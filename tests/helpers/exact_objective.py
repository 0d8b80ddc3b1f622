"""The objectives for a response of one token, in decimal arithmetic whose exponents never overflow.

They show which losses and gradients are finite.
"""

from __future__ import annotations

from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal, localcontext

FLOAT32_MAX = Decimal(2) ** 128 * (1 - Decimal(2) ** -24)
_CONTEXT = Context(prec=40, Emax=MAX_EMAX, Emin=MIN_EMIN, traps=[])


def share(config, log_prob, old, mu, ref, advantage) -> tuple[Decimal, Decimal]:
    """(loss, d loss / d log_prob) of the token, aggregated with weight 1."""
    with localcontext(_CONTEXT):
        log_prob, old, mu, ref, advantage = (Decimal(x) for x in (log_prob, old, mu, ref, advantage))
        loss, grad = _policy_term(config, log_prob, old, mu, advantage)
        if config.kl_coef:
            kl, kl_grad = _kl(config.kl_estimator, ref - log_prob)
            loss, grad = (x + Decimal(config.kl_coef) * y for x, y in ((loss, kl), (grad, kl_grad)))
        return loss, grad


def _policy_term(config, log_prob, old, mu, advantage):
    if config.rollout_is is None:
        mu = old
    bound = None if config.rollout_is_threshold is None else Decimal(config.rollout_is_threshold)

    def truncated(weight):
        return weight if bound is None else min(weight, bound)

    r, low, high = (log_prob - old).exp(), Decimal(1 - config.clip_ratio_low), Decimal(1 + config.clip_ratio_high)
    stopped = config.clip and ((advantage > 0 and r > high) or (advantage < 0 and r < low))
    if advantage == 0 or (stopped and config.weighs_by_w):
        return Decimal(0), Decimal(0)
    if config.objective == "sequence_is":
        weight = truncated((log_prob - mu).exp())
        return -weight * advantage, -weight * advantage
    if config.weighs_by_w:
        grad = -truncated((log_prob - mu).exp()) * advantage
        return (log_prob * grad if config.objective == "minirl" else grad), grad
    clipped = max(low, min(r, high)) if config.clip else r
    correction = truncated((old - mu).exp())
    if config.objective == "cispo":
        grad = -correction * clipped * advantage
        return log_prob * grad, grad
    if stopped:
        return -correction * clipped * advantage, Decimal(0)
    return -correction * r * advantage, -correction * r * advantage


def _kl(estimator, log_ratio):
    if estimator == "k1":
        return -log_ratio, Decimal(1)
    if estimator == "k2":
        return log_ratio * log_ratio / 2, -log_ratio
    return log_ratio.exp() - 1 - log_ratio, 1 - log_ratio.exp()
