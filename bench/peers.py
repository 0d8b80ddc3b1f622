"""The alternatives from logits, one function each, all from installed packages."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from batches import PolicyBatch
from harness import Contender
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Peer:
    """An alternative; `call(batch)` returns its outputs by the names of ours."""

    name: str
    call: Callable[[PolicyBatch], dict[str, Tensor]]
    package: str = "torch"
    gpu_only: bool = False
    compiles: bool = False  # whether its first call of a shape compiles


def contenders(alternatives: tuple[Peer, ...], batch, device: torch.device) -> list[Contender]:
    return [
        Contender(peer.name, partial(peer.call, batch), missing=available(peer, device), compiles=peer.compiles)
        for peer in alternatives
    ]


def available(peer: Peer, device: torch.device) -> str | None:
    """None if the peer can run on `device`, otherwise the reason why not."""
    if importlib.util.find_spec(peer.package) is None:
        return f"{peer.package} is not installed"
    if peer.gpu_only and device.type == "cpu":
        return "its kernels need a GPU"
    return no_compiler(device) if peer.name == COMPILED else None


def no_compiler(device: torch.device) -> str | None:
    """None if torch.compile can compile for `device`, otherwise the reason why not."""
    if device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return "torch.compile finds no C++ compiler"
    return None


# (logits, token_ids, entropy_requires_grad) -> (log_probs, entropy), float32 where the peer can


def _eager(logits, token_ids, entropy_requires_grad):
    log_p = torch.log_softmax(logits, -1, dtype=torch.float32)
    with torch.set_grad_enabled(entropy_requires_grad and torch.is_grad_enabled()):
        entropy = -(log_p.exp() * log_p).sum(-1)
    return log_p.gather(-1, token_ids[..., None]).squeeze(-1), entropy


# fullgraph: at dynamo's limit of recompilations it raises and does not fall back to eager torch
_compiled = torch.compile(_eager, dynamic=False, fullgraph=True)


def _trl(logits, token_ids, entropy_requires_grad):
    from trl.trainer.utils import selective_log_softmax_and_entropy

    return selective_log_softmax_and_entropy(logits, token_ids, entropy_requires_grad=entropy_requires_grad)


def _log_probs_and_entropy(function):
    @torch.no_grad()
    def forward(batch):
        log_probs, entropy = function(batch.logits, batch.token_ids, False)
        return {"log_probs": log_probs, "entropy": entropy}

    return forward


def _cross_entropy(batch):
    with torch.no_grad():
        losses = F.cross_entropy(batch.logits.flatten(0, 1), batch.token_ids.flatten(), reduction="none")
    return {"log_probs": -losses.view_as(batch.token_ids)}


def _liger_log_probs(batch):
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    logits = batch.logits_and_one_more.detach()
    return {"log_probs": fused_selective_log_softmax(logits, batch.token_ids, temperature=1.0)}


def _log_probs_and_entropy_backward(function):
    def forward_backward(batch):
        log_probs, entropy = function(batch.logits, batch.token_ids, True)
        grads = (batch.grad_log_probs.to(log_probs.dtype), batch.grad_entropy.to(entropy.dtype))
        (grad,) = torch.autograd.grad((log_probs, entropy), batch.logits, grads)
        return {"log_probs": log_probs.detach(), "entropy": entropy.detach(), "grad": grad}

    return forward_backward


# the metrics that a training loop logs, by the names of PolicyLossMetrics; ours computes more
METRICS = ("entropy", "discrepancy_kl_k3", "staleness_kl_k3", "clip_fraction_high", "clip_fraction_low",
           "truncation_fraction", "is_weight_mean", "ess")  # fmt: skip


def minirl_weights(batch, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The weight of each token in MiniRL's loss, and the masks of tokens that are clipped above and below."""
    config, advantages = batch.config, batch.advantages[:, None]
    too_high = (advantages > 0) & (r > 1 + config.clip_ratio_high)
    too_low = (advantages < 0) & (r < 1 - config.clip_ratio_low)
    return w.clamp(max=config.rollout_is_threshold) * advantages * ~(too_high | too_low), too_high, too_low


def _minirl(function):
    """A peer's log-probabilities, then MiniRL as a training loop writes it, in O(tokens)."""

    def forward_backward(batch):
        config = batch.config
        log_probs, entropy = function(batch.logits, batch.token_ids, False)
        with torch.no_grad():
            log_d = batch.old_log_probs - batch.rollout_log_probs
            log_r = log_probs - batch.old_log_probs
            r, w = log_r.exp(), (log_r + log_d).exp()
            weights, too_high, too_low = minirl_weights(batch, r, w)
            values = (entropy, log_d.expm1() - log_d, log_r.expm1() - log_r, too_high, too_low,
                      w > config.rollout_is_threshold, w)  # fmt: skip
            metrics = [value.float().mean() for value in values]
            metrics.append(w.sum().square() / (w.numel() * w.square().sum()))
        loss = -(weights * log_probs).sum(-1).mean()
        (grad,) = torch.autograd.grad(loss, batch.logits)
        return {
            "loss": loss.detach(),
            "log_probs": log_probs.detach(),
            "entropy": entropy.detach(),
            "metrics": torch.stack(metrics),
            "grad": grad,
        }

    return forward_backward


def _liger_cispo(batch):
    """CISPO with old := mu, which is MiniRL where no ratio is clipped; it returns the loss alone."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    logits = batch.logits_and_one_more
    loss, _ = triton_grpo_loss(
        logits,
        batch.rollout_log_probs,
        None,
        batch.token_ids,
        batch.advantages,
        temperature=1.0,
        beta=0.0,
        eps_high=batch.config.rollout_is_threshold,
        loss_type="cispo",
        reduce=True,
        num_items_in_batch=len(batch.advantages),
    )
    (grad,) = torch.autograd.grad(loss, logits)
    return {"loss": loss.detach(), "grad": grad[:, :-1]}


EAGER, COMPILED, TRL, LIGER = "eager torch", "torch.compile of it", "TRL", "Liger"


def _from_log_probs(way) -> tuple[Peer, ...]:
    """The three peers with log-probabilities and entropy; `way` makes a call of each."""
    return (
        Peer(EAGER, way(_eager)),
        Peer(COMPILED, way(_compiled), compiles=True),
        Peer(TRL, way(_trl), package="trl"),
    )


LOG_PROBS = (
    *_from_log_probs(_log_probs_and_entropy),
    Peer("F.cross_entropy", _cross_entropy),
    Peer(LIGER, _liger_log_probs, package="liger_kernel", gpu_only=True),
)
LOG_PROBS_BACKWARD = _from_log_probs(_log_probs_and_entropy_backward)
POLICY_LOSS = (
    *_from_log_probs(_minirl),
    Peer(LIGER, _liger_cispo, package="liger_kernel", gpu_only=True),
)
