"""The alternatives from hidden states, one function each, and their mini-batch."""

from __future__ import annotations

from dataclasses import dataclass

import peers
import torch
from harness import Contender, Inputs
from peers import Peer, minirl_weights
from torch import Tensor
from torch.nn import functional as F

from minirl_kernels import PolicyLossConfig, linear_token_logprobs

RESPONSES = 4


@dataclass
class LinearBatch(Inputs):
    """RESPONSES responses of equal length, every token in the loss; hidden [B, L, H] and weight [V, H] require grad."""

    hidden: Tensor
    weight: Tensor
    token_ids: Tensor  # [B, L], as are the log-probabilities
    old_log_probs: Tensor
    rollout_log_probs: Tensor
    advantages: Tensor  # [B]
    config: PolicyLossConfig = PolicyLossConfig()


def linear_batch(tokens: int, hidden_size: int, vocab_size: int, dtype: torch.dtype, device) -> LinearBatch:
    """A third of the tokens is truncated; none is masked, and no ratio is clipped."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (RESPONSES, tokens // RESPONSES)

    def normal(*size):
        return torch.randn(*size, device=device, generator=generator)

    def choose(values):
        index = torch.randint(len(values), shape, device=device, generator=generator)
        return torch.tensor(values, device=device)[index]

    hidden = normal(*shape, hidden_size).to(dtype)
    weight = (normal(vocab_size, hidden_size) / hidden_size**0.5).to(dtype)
    token_ids = torch.randint(vocab_size, shape, device=device, generator=generator)
    log_probs = linear_token_logprobs(hidden, weight, token_ids)
    # far from log 0.8, log 1.27 and log 5: bfloat16 rounding in a peer moves no token across a bound
    old_log_probs = log_probs - choose([-0.1, 0.1])
    return LinearBatch(
        hidden=hidden.requires_grad_(),
        weight=weight.requires_grad_(),
        token_ids=token_ids,
        old_log_probs=old_log_probs,
        rollout_log_probs=old_log_probs - choose([-0.1, 0.1, 2.5]),
        advantages=torch.tensor([1.0, -0.5, 0.75, -1.5], device=device),
    )


def contenders(batch: LinearBatch) -> list[Contender]:
    return peers.contenders(PEERS, batch, batch.hidden.device)


def bare_matmuls(batch: LinearBatch) -> dict[str, Tensor]:
    """The three matmuls of every implementation, whole, in the dtype of the operands."""
    hidden, weight = batch.hidden.detach().flatten(0, 1), batch.weight.detach()
    logits = hidden @ weight.T
    return {"hidden": logits @ weight, "weight": logits.T @ hidden}


# (hidden [T, H], weight, token_ids [T]) -> (log_probs [T], entropy [T] or None)


def _naive(hidden, weight, token_ids):
    log_p = torch.log_softmax(F.linear(hidden, weight), -1, dtype=torch.float32)
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(-1)
    return log_p.gather(-1, token_ids[:, None]).squeeze(-1), entropy


def _torch(hidden, weight, token_ids):
    options = torch.nn.LinearCrossEntropyOptions()
    return -F.linear_cross_entropy(hidden, weight, token_ids, reduction="none", options=options).float(), None


def _trl(hidden, weight, token_ids):
    from trl.kernels import ChunkedLogProbFunction

    log_probs, entropy, *_ = ChunkedLogProbFunction.apply(
        hidden, weight, None, token_ids, 1.0, 8192, None, 1.0, ("entropy",)
    )
    return log_probs, entropy


def _cut_cross_entropy(hidden, weight, token_ids):
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, token_ids, reduction="none", impl="torch_compile").float(), None


def _minirl(function):
    """A peer's log-probabilities, then MiniRL as a training loop writes it, in O(tokens)."""

    def forward_backward(batch):
        log_probs, entropy = function(batch.hidden.flatten(0, 1), batch.weight, batch.token_ids.flatten())
        log_probs = log_probs.view(batch.token_ids.shape)
        with torch.no_grad():
            r, w = (log_probs - batch.old_log_probs).exp(), (log_probs - batch.rollout_log_probs).exp()
            weights, _, _ = minirl_weights(batch, r, w)
        loss = -(weights * log_probs).sum(-1).mean()
        grad_hidden, grad_weight = torch.autograd.grad(loss, (batch.hidden, batch.weight))
        outputs = {"loss": loss.detach(), "log_probs": log_probs.detach()}
        if entropy is not None:
            outputs["entropy"] = entropy.detach().view(batch.token_ids.shape)
        return {**outputs, "grad_hidden": grad_hidden, "grad_weight": grad_weight}

    return forward_backward


def _liger_cispo(batch):
    """CISPO with old := mu, which is MiniRL where no ratio is clipped; it returns the loss alone."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    function = LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, loss_type="cispo", epsilon_high=batch.config.rollout_is_threshold
    )
    loss, _ = function(
        batch.hidden,
        batch.weight,
        batch.token_ids,
        torch.ones_like(batch.token_ids),
        batch.advantages,
        old_per_token_logps=batch.rollout_log_probs,
        num_items_in_batch=len(batch.advantages),
    )
    grad_hidden, grad_weight = torch.autograd.grad(loss, (batch.hidden, batch.weight))
    return {"loss": loss.detach(), "grad_hidden": grad_hidden, "grad_weight": grad_weight}


NAIVE, TORCH, LIGER, TRL, CCE = "naive", "F.linear_cross_entropy", "Liger", "TRL", "CCE (torch_compile)"
PEERS = (
    Peer(NAIVE, _minirl(_naive)),
    Peer(TORCH, _minirl(_torch)),
    Peer(LIGER, _liger_cispo, package="liger_kernel", compiles=True),
    Peer(TRL, _minirl(_trl), package="trl"),
    Peer(CCE, _minirl(_cut_cross_entropy), package="cut_cross_entropy", compiles=True),
)
