"""enable_log_probs and disable_log_probs. They also find the model inside wrappers (PEFT, DDP, FSDP, torch.compile)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from ..packing import forget_packing, packing_leak
from .after_head import AfterHead, ask_what_follows
from .head import check_head, is_taken, leave_head, take_head
from .hooks import LogProbsHooks, hooks_of, is_sharded


def enable_log_probs(model: nn.Module) -> nn.Module:
    """Let `model(...)` take token_ids, and return their log-probabilities, entropy and policy loss without logits.

    model: a causal language model of transformers; or a PEFT, DistributedDataParallel, FSDP or compiled model around
        one. Its output embeddings must be an nn.Linear, or LoRA or modules_to_save of PEFT around one. The model is
        changed in place and returned.

    New keywords of model(...), not of model.forward(...):
        token_ids: [B, L] int32 or int64, the ids that the positions score. Nothing is shifted; -100 scores nothing.
        temperature: divides the logits; a number or one float32 per token.
        kept: a SamplingMask [B, L], the tokens that the sampler kept at each position.
        policy_loss: a dict of keyword arguments of `fused_linear_policy_loss` (old_log_probs, advantages, …).
        Their tensors are moved to the model's device. For an attention_mask padded on the left, without position_ids,
        position_ids are derived from the mask, as `generate` does.

    The output has log_probs and entropy, [B, L] float32 in nats, instead of logits. Its other fields do not change.
    Without policy_loss, both come from `linear_token_logprobs` and are differentiable. With policy_loss, the output has
    two more fields: policy_loss, a PolicyLossOutput, and loss. Only loss carries gradient. The head follows autocast.

    Calls without token_ids (as in `generate`) do not change, with one exception: in batch_invariant_mode, without
    gradients, their logits are float32, not rounded to the model's dtype.

    A later replacement of model.forward is respected. Call this function again after adding a wrapper (PEFT, FSDP) or
    replacing the output embeddings (resize_token_embeddings). `disable_log_probs` reverts everything.

    A call with token_ids and packed sequences (position_ids that restart, or cu_seq_lens_q; no attention_mask) raises
    ValueError if the model lets sequences mix, as convolutions and recurrences do; see `packing_leak`.

    This function runs some tokens through the model, to measure the scale and softcap of its logits and to test packed
    sequences. Raises TypeError for an unknown kind of head (DoRA, quantised). Raises ValueError if the model applies
    more to its logits than a positive scale and a softcap.
    """
    path = _path_of(model)
    causal_lm = path[-1]
    head = causal_lm.get_output_embeddings()
    name = type(causal_lm).__name__
    found = hooks_of(causal_lm)
    if found and is_taken(head):
        check_head(head, name)  # adapters may have been added
        after = found[0].after
    else:
        if any(_is_fsdp1(module) for module in path):  # a forward without its backward would lose the next gradients
            raise ValueError(
                f"model is a {name} in FullyShardedDataParallel: enable_log_probs must come before it, and again after"
            )
        root = next((module for module in path if is_sharded(module)), None)  # the outermost gathers the shards
        take_head(head, name)
        try:
            if root is None:
                packing_leak(causal_lm)  # tested here, since a compiled forward cannot run it
            after = ask_what_follows(root or causal_lm, causal_lm, head)
        except BaseException:
            leave_head(head)
            raise
    for hooks in found:
        hooks.remove()
    LogProbsHooks(causal_lm, after).add_to(path)
    return model


def disable_log_probs(model: nn.Module) -> nn.Module:
    """Revert enable_log_probs. The model is changed in place and returned; a model without it is not changed."""
    for module in model.modules():
        for hooks in hooks_of(module):
            hooks.remove()
        leave_head(module)
        forget_packing(module)
    return model


def after_head(model: nn.Module) -> AfterHead:
    """Scale and softcap that an enabled `model` applies to its logits. Raises ValueError if it is not enabled."""
    found = hooks_of(_path_of(model)[-1])
    if not found:
        raise ValueError(f"model is a {type(model).__name__} without enable_log_probs: it must be enabled")
    return found[0].after


def _path_of(model: nn.Module) -> list[nn.Module]:
    """`model` and the modules inside its wrappers, from the outermost to the model of transformers."""
    path = [model]
    while not isinstance(path[-1], PreTrainedModel):
        inner = _inside(path[-1])
        if inner is None:
            raise TypeError(f"model is a {type(path[-1]).__name__}: it must be a causal language model of transformers")
        path.append(inner)
    return path


def _inside(module: nn.Module) -> nn.Module | None:
    if isinstance(module, torch._dynamo.OptimizedModule):
        return module._orig_mod
    if isinstance(module, DistributedDataParallel) or _is_fsdp1(module):
        return module.module
    if hasattr(module, "get_base_model"):  # a PEFT model, around a tuner or (prompt tuning) around the model
        return module.base_model
    if type(module).__module__.startswith("peft.tuners."):
        return module.model
    return None


def _is_fsdp1(module: nn.Module) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FullyShardedDataParallel

    return isinstance(module, FullyShardedDataParallel)
