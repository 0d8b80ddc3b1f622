"""Causal language models of transformers that return log-probabilities, entropy and the policy loss instead of logits.

The model's own forward runs, with two changes: its head keeps the hidden states that it is given and hands on no
logits, and the linear losses then take these with the head's weight. What a family does between hidden states and
logits is thereby right where it comes before the head. What comes after it (a scale, a softcap) is asked of the model
once, with a few made-up logits; a table of the names that families have for it would miss the next one.
"""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ...batch_invariant import is_batch_invariant
from ...ops.fused_linear_policy_loss import fused_linear_policy_loss
from ...ops.linear_token_logprobs import linear_token_logprobs
from ...ops.matmul.op import float32_linear


def enable_log_probs(model: nn.Module) -> nn.Module:
    """Let `model(...)` take token_ids, and return log-probabilities, entropy and losses of them without any logits.

    model: a causal language model of transformers, or a PEFT model of one, whose output embeddings are an nn.Linear;
        changed in place and returned. Calls without token_ids (those of `generate`) do what they did before, except
        that in batch_invariant_mode, without gradients, their logits are float32 and not rounded to the model's dtype.

    New keywords of model(...):
        token_ids: [B, L] int32 or int64, ids that the positions score: nothing is shifted; -100 scores nothing.
        temperature: divides the logits; a number or one float per token.
        policy_loss: a dict, keyword arguments of `fused_linear_policy_loss` (old_log_probs, advantages, …).
    The output has log_probs and entropy, [B, L] float32, nats, and no logits; all else in it stays. Without
    policy_loss both are those of `linear_token_logprobs`, differentiable. With it the output also has policy_loss, a
    PolicyLossOutput, whose loss is the output's loss; nothing but that carries gradient. Autocast applies to the head.

    One token is sent through the model to see what it does to its logits. Raises TypeError or ValueError that says
    what is unknown: another kind of head (LoRA, quantised), or more done to logits than a positive scale and a softcap.
    """
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(causal_lm, PreTrainedModel):
        raise TypeError(f"model is a {type(causal_lm).__name__}: it must be a causal language model of transformers")
    head = causal_lm.get_output_embeddings()
    if isinstance(getattr(head, "tap", None), _Tap):
        return model
    name = type(causal_lm).__name__
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward or "forward" in vars(head):
        raise TypeError(
            f"the output embeddings of {name} are a {type(head).__name__}: they must be an nn.Linear with its own "
            "forward (merge or leave out adapters of the head, and do not quantise it)"
        )
    if "forward" in vars(causal_lm):
        raise TypeError(f"the forward of this {name} was replaced before: enable_log_probs must come first")
    if head.weight.is_meta:
        raise ValueError(f"the weights of {name} are on the meta device: enable_log_probs must come after loading them")
    scale, softcap = _what_follows_the_head(causal_lm, head)
    head.tap.logit_scale, head.tap.logit_softcap = scale, softcap
    causal_lm.forward = types.MethodType(_with_log_probs(type(causal_lm).forward), causal_lm)
    return model


@dataclass
class _Tap:
    """Of a head: whether it is to keep what it is given, and what is done to its logits after it."""

    is_open: bool = False
    stand_in: Tensor | None = None  # for the logits; None: an empty tensor
    hidden: Tensor | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None


def _head_forward(self: nn.Linear, input: Tensor) -> Tensor:
    if not self.tap.is_open:
        # a token is then sampled from the very numbers that its log-probability in training is made of
        exact = is_batch_invariant() and not torch.is_grad_enabled()
        return float32_linear(input, self.weight, self.bias) if exact else nn.Linear.forward(self, input)
    if self.tap.hidden is not None:
        raise ValueError("the model calls its output embeddings more than once in a forward: it must be once")
    self.tap.hidden = input
    if self.tap.stand_in is not None:
        return self.tap.stand_in
    return input.new_empty(0, *input.shape[1:-1], self.out_features)


def _tapped(head: nn.Linear, forward, stand_in: Tensor | None = None) -> tuple[Any, Tensor]:
    """(what forward() returns, the hidden states that the head was given in it)."""
    tap = getattr(head, "tap", None)
    if tap is None:
        raise ValueError("the output embeddings were replaced after enable_log_probs: it must come last")
    tap.is_open, tap.stand_in = True, stand_in
    try:
        output = forward()
        hidden = tap.hidden
    finally:
        tap.is_open, tap.stand_in, tap.hidden = False, None, None
    if hidden is None:
        raise ValueError("the model's forward does not call its output embeddings: no logits are made of them")
    return output, hidden


def _with_log_probs(forward):
    # the signature stays: generate reads it to see that logits of the last position will do
    @functools.wraps(forward)
    def with_log_probs(
        self,
        *args,
        token_ids: Tensor | None = None,
        temperature: float | Tensor = 1.0,
        policy_loss: dict[str, Any] | None = None,
        **kwargs,
    ):
        if token_ids is None:
            if policy_loss is not None:
                raise ValueError("policy_loss is given without token_ids: it must come with the ids that are scored")
            return forward(self, *args, **kwargs)
        if kwargs.get("labels") is not None:
            raise ValueError("labels is given with token_ids: it must be None, there are no logits to compare it with")
        head = self.get_output_embeddings()
        output, hidden = _tapped(head, lambda: forward(self, *args, **{**kwargs, "return_dict": True}))
        if type(head.weight.data) is not Tensor:
            raise TypeError(
                f"the weight of the output embeddings is a {type(head.weight.data).__name__}: it must be a plain "
                "tensor inside the model's forward (shard the head with the whole model, not by itself)"
            )
        arguments = {
            "hidden": hidden,
            "weight": head.weight,
            "token_ids": token_ids,
            "bias": head.bias,
            "temperature": temperature,
            "logit_scale": head.tap.logit_scale,
            "logit_softcap": head.tap.logit_softcap,
        }
        new: dict[str, Any] = {}
        if policy_loss is None:
            new["log_probs"], new["entropy"] = linear_token_logprobs(**arguments, with_entropy=True)
        else:
            result = fused_linear_policy_loss(**arguments, **policy_loss)
            new = {"loss": result.loss, "log_probs": result.log_probs, "entropy": result.entropy, "policy_loss": result}
        return _replaced(output, new)

    return with_log_probs


def _replaced(output: ModelOutput, new: dict[str, Any]) -> ModelOutput:
    """A copy of `output` without logits and with what is new."""
    kept = type(output)(**{name: value for name, value in output.items() if name not in ("logits", "loss")})
    for name, value in new.items():
        kept[name] = value
    return kept


# From where any softcap is linear to where it is flat; float64, of which float32 keeps all but the ends' last digits.
_PROBES = (2.0**-30, 0.0, -1.0, 1.0, -10.0, 10.0, 50.0, -300.0, 1e30)


@torch.enable_grad()
def _what_follows_the_head(model: PreTrainedModel, head: nn.Linear) -> tuple[float, float | None]:
    """(scale, softcap) of f(u) = softcap tanh(scale u / softcap), f being what `model` does to the head's logits u."""
    name, device = type(model).__name__, head.weight.device
    probes = torch.tensor(_PROBES, dtype=torch.float64, device=device)
    head.tap = _Tap()
    head.forward = types.MethodType(_head_forward, head)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # there may be dropout on the way
            output, _ = _tapped(
                head,
                lambda: model(torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False, return_dict=True),
                stand_in=probes[None, :, None].expand(1, -1, head.out_features).contiguous(),
            )
        if output.logits.requires_grad:
            raise ValueError(f"{name} scales its logits by a parameter: that must be a number")
        values = output.logits.double()
        scale, softcap = values[0, 0, 0].item() / _PROBES[0], values[0, -1, 0].item()
        scale = 1.0 if abs(scale - 1.0) < 1e-6 else scale
        if softcap > 0.5 * scale * _PROBES[-1]:
            softcap, expected = None, scale * probes
        else:
            expected = softcap * torch.tanh(scale * probes / softcap)
        expected = expected[None, :, None].expand(1, -1, head.out_features)
        if not (scale > 0 and values.shape == expected.shape and torch.allclose(values, expected, rtol=1e-6, atol=0)):
            raise ValueError(
                f"{name} does more to its logits after its head than a positive scale and a softcap: of "
                f"{list(_PROBES)} it makes {values[..., 0].flatten().tolist()} in a row of shape {tuple(values.shape)}"
            )
    except BaseException:
        del head.tap, head.forward
        raise
    return scale, softcap
