"""Reference of moe_routing, in eager torch."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import bad_rows


def moe_routing_reference(
    router_logits: Tensor,
    top_k: int,
    routed_experts: Tensor | None = None,
    valid: Tensor | None = None,
    norm_topk_prob: bool = True,
    scoring: str = "softmax",
    correction_bias: Tensor | None = None,
    num_groups: int = 1,
    top_k_groups: int = 1,
    scale: float = 1.0,
) -> tuple[Tensor, ...]:
    """The fields of Routing for router_logits [T, E]; weights are differentiable.

    The weights, agreement and mass of a bad row are NaN, as on a GPU.
    """
    logits = router_logits.to(torch.promote_types(router_logits.dtype, torch.float32))
    if scoring == "softmax":
        log_scores, scores = logits, torch.softmax(logits, -1)
    else:
        log_scores, scores = torch.nn.functional.logsigmoid(logits), torch.sigmoid(logits)
    selection = selection_scores(logits, scores, correction_bias, num_groups, top_k_groups).detach()
    ranked, order = selection.sort(dim=-1, descending=True, stable=True)  # of equal scores, the lower id comes first
    natural = order[:, :top_k]
    candidates = logits.shape[-1] // num_groups * top_k_groups
    if top_k < candidates:
        kth, next_one = ranked[:, top_k - 1], ranked[:, top_k]
        margin = (kth - next_one).where(kth != next_one, 0.0)  # 0 for two equal infinities, whose difference is NaN
    else:
        margin = torch.full_like(ranked[:, 0], torch.inf)
    chosen, bad = natural, torch.zeros_like(natural[:, 0], dtype=torch.bool)
    if routed_experts is not None:
        replayed = torch.ones_like(bad) if valid is None else valid
        ids = routed_experts.long()
        bad = bad_rows(ids, logits.shape[-1]) & replayed
        chosen = ids.where((replayed & ~bad)[:, None], natural)
    shared = (chosen[:, :, None] == natural[:, None, :]).any(-1)
    agreement = shared.to(logits.dtype).mean(-1)
    mass = torch.softmax(log_scores.detach(), -1).gather(-1, chosen).sum(-1)
    # a softmax over the K gathered logits, because all K scores may underflow to 0
    normalised = torch.softmax(log_scores.gather(-1, chosen), -1)
    weights = normalised if norm_topk_prob else scores.gather(-1, chosen)
    agreement, mass = (values.masked_fill(bad, torch.nan) for values in (agreement, mass))
    # a product with NaN, rather than masked_fill, makes the gradient NaN too
    weights = weights * torch.where(mass.isnan(), torch.nan, scale)[:, None]
    return weights, chosen, natural, agreement, mass, margin


def selection_scores(logits, scores, correction_bias, num_groups, top_k_groups) -> Tensor:
    """[T, E]: the scores that select the natural experts; -inf in groups that are not kept."""
    if correction_bias is None and num_groups == 1:
        return logits
    selection = scores if correction_bias is None else scores + correction_bias
    if num_groups > 1:
        by_group = selection.unflatten(-1, (num_groups, -1))
        group_scores = by_group.topk(2, -1).values.sum(-1)
        best = group_scores.sort(dim=-1, descending=True, stable=True).indices[:, :top_k_groups]
        kept = torch.zeros_like(group_scores, dtype=torch.bool).scatter(-1, best, True)
        selection = by_group.masked_fill(~kept[..., None], -torch.inf).flatten(-2)
    return selection
