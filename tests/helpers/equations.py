"""The losses written a second time, from their equations: response by response, differentiated by autograd.

Nothing here comes from minirl_kernels; only the fields of a config are read. Everything is computed in the given dtype.
float64 is the truth. float32 is the eager path, whose error the library may not exceed.
"""

from __future__ import annotations

import math

import torch


def token_log_probs(logits, token_ids, temperature=1.0):
    """(log-probability, entropy) [T] of finite logits [T, V]; -100 gives 0."""
    temperature = torch.as_tensor(temperature, dtype=logits.dtype).expand(token_ids.shape)
    log_p = torch.log_softmax(logits / temperature[:, None], dim=-1)
    ignored = token_ids == -100
    log_probs = log_p.gather(-1, token_ids.masked_fill(ignored, 0).long()[:, None])[:, 0]
    return log_probs.masked_fill(ignored, 0), -(log_p.exp() * log_p).sum(-1).masked_fill(ignored, 0)


def upstream(token_ids):
    """Gradients of the log-probabilities and of the entropy; they differ from token to token."""
    steps = torch.arange(token_ids.numel()).reshape(token_ids.shape)
    return (1.5 - steps % 4).float(), (0.75 - steps % 3).float()


def token_log_probs_and_gradients(leaves, logits, token_ids, temperature=1.0):
    """[log-probabilities, entropy, gradient of each leaf under `upstream`]; the logits are made from the leaves."""
    outs = token_log_probs(logits, token_ids, temperature)
    grads = torch.autograd.grad(outs, leaves, [values.to(logits.dtype) for values in upstream(token_ids)])
    return [*(out.detach() for out in outs), *grads]


def policy_loss_and_gradients(leaves, log_probs, entropy, batch, config, **counts):
    """[loss, log-probabilities, entropy, gradient of each leaf].

    The log-probability and entropy of a token outside of the mask are 0.
    """
    loss = policy_loss(log_probs, entropy, batch, config, **counts)
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    per_token = [values.detach().where(batch.loss_mask, 0.0) for values in (log_probs, entropy)]
    return [loss.detach(), *per_token, *grads]


def policy_loss(log_probs, entropy, batch, config, *, num_responses=None, num_tokens=None, num_groups=None):
    """The loss of a whole batch. log_probs and entropy are [T], and their dtype is used throughout."""
    sums, counts = [], []
    for start, end in batch.spans():
        tokens = [t for t in range(start, end) if batch.loss_mask[t]]

        def of_response(values, tokens=tokens):
            return None if values is None else values[tokens].to(log_probs.dtype)

        sums.append(
            response_loss(
                log_probs[tokens],
                entropy[tokens],
                of_response(batch.old_log_probs),
                of_response(batch.rollout_log_probs),
                of_response(batch.ref_log_probs),
                of_response(batch.token_advantages()),
                config,
            )
        )
        counts.append(len(tokens))
    loss = aggregate(
        sums, counts, batch.group_ids, config, num_responses=num_responses, num_tokens=num_tokens, num_groups=num_groups
    )
    return loss + log_probs[:0].sum()  # a tensor even where there is no response


def response_loss(log_probs, entropy, old, mu, ref, advantages, config):
    """Minus the objective, plus KL, minus entropy, summed over the tokens of one response; all arguments [n]."""
    if not len(log_probs):
        return log_probs.sum()
    old = log_probs.detach() if old is None else old
    loss = -objective(log_probs, old, old if config.rollout_is is None else mu, advantages, config)
    if config.kl_coef:
        gap = ref - log_probs
        kl = {"k1": -gap, "k2": gap**2 / 2, "k3": gap.exp() - 1 - gap}[config.kl_estimator]
        loss = loss + config.kl_coef * kl.sum()
    if config.entropy_coef:
        loss = loss - config.entropy_coef * entropy.sum()
    return loss


def objective(log_probs, old, mu, advantages, config):
    """J of one response, to be maximised."""
    bound = math.inf if config.rollout_is_threshold is None else config.rollout_is_threshold
    low, high = 1 - config.clip_ratio_low, 1 + config.clip_ratio_high
    r = (log_probs - old).exp()
    d = (old - mu).exp() if config.rollout_is == "token" else (old - mu).sum().exp().expand(len(old))
    w = d * r
    here = (log_probs - log_probs.detach()).exp()  # 1, with the derivative of pi / sg[pi]

    if config.objective == "minirl":
        stopped = ((advantages > 0) & (r > high)) | ((advantages < 0) & (r < low)) if config.clip else r.isnan()
        return sum(m * weight * a * lp for m, weight, a, lp in zip(
            (~stopped).to(r.dtype), w.clamp(max=bound).detach(), advantages, log_probs, strict=True))  # fmt: skip
    if config.objective == "reinforce":
        truncated = torch.where(w > bound, bound * here, w) if bound < math.inf else w
        return (truncated * advantages).sum()
    if config.objective == "sequence_is":
        product = (log_probs - mu).sum().exp()
        if product > bound:
            product = bound * here.prod()
        return product * advantages[0]
    correction = d.clamp(max=bound).detach()
    if config.objective == "cispo":
        weight = (r.clamp(low, high) if config.clip else r).detach()
        return (correction * weight * advantages * log_probs).sum()
    if config.objective == "gspo":  # the token form, which has the gradient of the sequence form
        r = (log_probs - old).mean().exp().detach() * here
    clipped = r.clamp(low, high) if config.clip else r
    return (correction * torch.minimum(r * advantages, clipped * advantages)).sum()


def aggregate(sums, counts, group_ids, config, *, num_responses=None, num_tokens=None, num_groups=None):
    """One number from each response's sum over its tokens."""
    mode = config.loss_agg_mode
    if mode == "token-mean":
        return sum(sums) / (num_tokens or max(sum(counts), 1))
    if mode == "group-token-mean":
        groups = sorted(set(group_ids.tolist()))
        total = 0.0
        for group in groups:
            members = [i for i, g in enumerate(group_ids.tolist()) if g == group]
            total = total + sum(sums[i] for i in members) / max(sum(counts[i] for i in members), 1)
        return total / (num_groups or max(len(groups), 1))
    divisor = {
        "seq-mean-token-sum": lambda count: 1,
        "seq-mean-token-mean": lambda count: max(count, 1),
        "seq-mean-token-sum-norm": lambda count: config.loss_scale_factor,
    }[mode]
    return sum(s / divisor(n) for s, n in zip(sums, counts, strict=True)) / (num_responses or max(len(sums), 1))
