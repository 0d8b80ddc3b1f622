"""enable_log_probs, disable_log_probs and what they know of the modules that may wrap a model."""

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
    """Let `model(...)` take token_ids, and return log-probabilities, entropy and losses of them without any logits.

    model: a causal language model of transformers whose output embeddings are an nn.Linear, or LoRA or
        modules_to_save of PEFT around one; or a PEFT, DistributedDataParallel, FSDP or compiled model of one. It is
        changed in place and returned. Calls without token_ids (those of `generate`) do what they did before, except
        that in batch_invariant_mode, without gradients, their logits are float32 and not rounded to the model's dtype.

    New keywords of model(...), not of model.forward(...):
        token_ids: [B, L] int32 or int64, ids that the positions score: nothing is shifted; -100 scores nothing.
        temperature: divides the logits; a number or one float32 per token.
        kept: a SamplingMask [B, L], the tokens that the sampler kept at each position.
        policy_loss: a dict, keyword arguments of `fused_linear_policy_loss` (old_log_probs, advantages, …).
        Tensors are moved to the model's device. With them, an attention_mask that is padded on the left and no
        position_ids, position_ids are derived from the mask, as `generate` does.
    The output has log_probs and entropy, [B, L] float32, nats, and no logits; all else in it stays. Without
    policy_loss both are those of `linear_token_logprobs`, differentiable. With it the output also has policy_loss, a
    PolicyLossOutput, whose loss is the output's loss; nothing but that carries gradient. Autocast applies to the head.

    Whatever replaces model.forward later is called. Call this again where a wrapper came later (PEFT, FSDP), or other
    output embeddings (resize_token_embeddings); that changes nothing else. `disable_log_probs` takes it back.

    A call with token_ids and packed sequences (position_ids that restart, cu_seq_lens_q; no attention_mask) raises
    ValueError where the model lets sequences mix, as convolutions and recurrences do; see `packing_leak`.

    Some tokens are sent through the model, to see what it does to its logits and to packed sequences. Raises TypeError
    or ValueError that says what is unknown: another kind of head (DoRA, quantised), or more done to logits than a
    positive scale and a softcap.
    """
    path = _path_of(model)
    causal_lm = path[-1]
    head = causal_lm.get_output_embeddings()
    name = type(causal_lm).__name__
    found = hooks_of(causal_lm)
    if found and is_taken(head):
        check_head(head, name)  # adapters may have come
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
                packing_leak(causal_lm)  # asked here: a compiled forward could not
            after = ask_what_follows(root or causal_lm, causal_lm, head)
        except BaseException:
            leave_head(head)
            raise
    for hooks in found:
        hooks.remove()
    LogProbsHooks(causal_lm, after).add_to(path)
    return model


def disable_log_probs(model: nn.Module) -> nn.Module:
    """Take back what enable_log_probs did to `model`, which is changed in place and returned; nothing if it did not."""
    for module in model.modules():
        for hooks in hooks_of(module):
            hooks.remove()
        leave_head(module)
        forget_packing(module)
    return model


def after_head(model: nn.Module) -> AfterHead:
    """What `model`, enabled, does to its logits after its head. Raises ValueError if it is not enabled."""
    found = hooks_of(_path_of(model)[-1])
    if not found:
        raise ValueError(f"model is a {type(model).__name__} without enable_log_probs: it must be enabled")
    return found[0].after


def _path_of(model: nn.Module) -> list[nn.Module]:
    """`model`, what it wraps, what that wraps, down to the model of transformers."""
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
    if hasattr(module, "get_base_model"):  # a PEFT model: of a tuner, or of a model with a longer prompt
        return module.base_model
    if type(module).__module__.startswith("peft.tuners."):
        return module.model
    return None


def _is_fsdp1(module: nn.Module) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FullyShardedDataParallel

    return isinstance(module, FullyShardedDataParallel)
