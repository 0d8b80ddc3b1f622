"""Errors for losses that overflow float32: they name the token and its log-ratios."""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.checks import place_of_token
from ...common.library import register
from .inputs import PolicyLossInputs
from .reference import token_ratios


def check_losses(
    loss: Tensor, token_loss: Tensor, token_grad: Tensor, log_probs: Tensor, inputs: PolicyLossInputs
) -> tuple[Tensor, Tensor, Tensor]:
    """Copies of loss, token_loss and token_grad. Waits for the device.

    Raises ValueError that names the token where one of the three overflows.
    """
    token = token_ratios(log_probs, inputs)
    log_ref = inputs.ref_log_probs.double() - log_probs if inputs.config.kl_coef else None
    ratios = (log_probs, token.log_r, token.log_w, log_ref, inputs.advantages)
    return _checked_losses(loss, token_loss, token_grad, *ratios, inputs.layout.offsets)


def raise_overflow(token_loss, token_grad, log_probs, log_r, log_w, log_ref, advantages, offsets) -> None:
    """Raise ValueError for the first token whose loss or c_t is not finite, unless its log-ratios are NaN.

    All tensors but offsets [B + 1] are [B, L] or [T]. The log-ratios are at the objective's level. log_ref may be None.
    """
    bad = ~(token_loss.isfinite() & token_grad.isfinite()) & ~(log_r.isnan() | log_w.isnan())
    if bool(bad.any()):
        _raise(bad, log_probs, log_r, log_w, log_ref, advantages, offsets)


def _raise(bad, log_probs, log_r, log_w, log_ref, advantages, offsets):
    row = bad.flatten().nonzero()[0].item()
    values = {
        "log_probs": log_probs,
        "log(pi_theta / pi_old)": log_r,
        "log(pi_theta / mu_old)": log_w,
        "log(pi_ref / pi_theta)": log_ref,
        "advantages": advantages,
    }
    listed = ", ".join(f"{name} {x.flatten()[row].item():.6g}" for name, x in values.items() if x is not None)
    raise ValueError(
        f"the loss overflows at {place_of_token(row, offsets)}, with {listed}: its loss and its gradient must be "
        "finite in float32, where exp overflows above 88.7; bound the ratio, or take the token out of loss_mask"
    )


def _check_losses(loss, token_loss, token_grad, *ratios):
    raise_overflow(token_loss, token_grad, *ratios)
    if bool(loss.isinf()):  # finite token losses can still have an infinite sum
        _raise(token_loss.abs() == token_loss.abs().max(), *ratios)
    return loss.clone(), token_loss.clone(), token_grad.clone()


# an op, because torch.compile cannot trace branches on values; its results are used, so that it is not removed
_checked_losses = register(
    "checked_losses(Tensor loss, Tensor token_loss, Tensor token_grad, Tensor log_probs, Tensor log_r, Tensor log_w, "
    "Tensor? log_ref, Tensor advantages, Tensor offsets) -> (Tensor, Tensor, Tensor)",
    _check_losses,
    lambda loss, token_loss, token_grad, *_: tuple(torch.empty_like(x) for x in (loss, token_loss, token_grad)),
    waits=True,
)
