"""Made-up mini-batches with logits, which are written again after a run that overwrote them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from harness import Inputs
from torch import Tensor

from minirl_kernels import PolicyLossConfig

RESPONSES = 4


@dataclass
class PolicyBatch(Inputs):
    """RESPONSES responses of equal length, every token in the loss; logits are [B, L, V] and require grad."""

    logits: Tensor
    token_ids: Tensor  # [B, L], as are the log-probabilities
    old_log_probs: Tensor
    rollout_log_probs: Tensor
    advantages: Tensor  # [B]
    grad_log_probs: Tensor  # [B, L], as a loss would return it to the op
    grad_entropy: Tensor
    config: PolicyLossConfig = PolicyLossConfig()
    _original: Tensor = field(init=False, repr=False)

    def __post_init__(self):
        self._original = self.logits.detach().clone()

    @cached_property
    def logits_and_one_more(self) -> Tensor:
        """[B, L + 1, V]: the same logits in the layout of calls that drop the last position themselves."""
        longer = torch.cat([self._original, self._original[:, :1]], dim=1)
        return longer.requires_grad_()

    @torch.no_grad()
    def restore(self) -> None:
        """Write every logit again, so that each run finds the same values and the same state of the caches."""
        self.logits.copy_(self._original)
        if "logits_and_one_more" in self.__dict__:
            self.logits_and_one_more[:, :-1].copy_(self._original)


def policy_batch(tokens: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> PolicyBatch:
    """`tokens` rows of logits; a third of the tokens is truncated and none is masked, since ours skips masked rows."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (RESPONSES, tokens // RESPONSES)

    def normal(*size):
        return torch.randn(*size, device=device, generator=generator)

    def choose(values):
        index = torch.randint(len(values), shape, device=device, generator=generator)
        return torch.tensor(values, device=device)[index]

    logits = torch.empty(*shape, vocab_size, dtype=dtype, device=device)
    token_ids = torch.randint(vocab_size, shape, device=device, generator=generator)
    log_probs = torch.empty(shape, device=device)
    for response, ids, out in zip(logits, token_ids, log_probs, strict=True):  # float32 copies of one response only
        response.copy_(2 * normal(*response.shape))
        out.copy_(torch.log_softmax(response.float(), -1).gather(-1, ids[:, None]).squeeze(-1))
    # far from log 0.8, log 1.27 and log 5: bfloat16 rounding in a peer moves no token across a bound
    old_log_probs = log_probs - choose([-0.1, 0.1])
    rollout_log_probs = old_log_probs - choose([-0.1, 0.1, 2.5])
    return PolicyBatch(
        logits=logits.requires_grad_(),
        token_ids=token_ids,
        old_log_probs=old_log_probs,
        rollout_log_probs=rollout_log_probs,
        advantages=torch.tensor([1.0, -0.5, 0.75, -1.5], device=device),
        grad_log_probs=normal(*shape),
        grad_entropy=normal(*shape),
    )
