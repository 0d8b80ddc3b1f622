"""The hooks that take the new keywords of a model's call and add the new fields to its output.

They are on the model and on every wrapper around it, since a caller may call any of them. The outermost called module
takes the keywords. The innermost adds the fields: there the weights are whole, and the wrappers see the fields. The
last hook of each module restores float32 fields that FSDP2 has cast.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ....ops.fused_linear_policy_loss import fused_linear_policy_loss
from ....ops.linear_token_logprobs import linear_token_logprobs
from ....ops.policy_loss import PolicyLossInputs
from ....sampling_mask import SamplingMask
from ..packing import refuse_packed
from .after_head import AfterHead
from .calls import Call, current_call, set_call
from .head import gives_float32, is_taken, linear_of
from .output import restored, with_fields
from .positions import Positions

_KEYWORDS = ("token_ids", "temperature", "kept", "policy_loss")
_REPLACED = "the output embeddings were replaced after enable_log_probs: it must be called again"


class LogProbsHooks:
    """The hooks of one model, copied and pickled with it. They hold no state of a call."""

    def __init__(self, model: PreTrainedModel, after: AfterHead):
        self.model, self.after = model, after
        self._positions = Positions(model)
        # kept, since a live handle prevents torch from reusing its number after the model was unpickled
        self._handles: list[RemovableHandle] = []

    def add_to(self, path: list[nn.Module]) -> None:
        """path: all modules that may be called, from the outermost wrapper to the model."""
        for module in path:
            self._handles += [
                module.register_forward_pre_hook(self._take, prepend=True, with_kwargs=True),
                module.register_forward_hook(self._make, prepend=True),
                module.register_forward_hook(self._close, always_call=True),
            ]
        decoder = self.model.base_model
        if decoder is not self.model:
            self._handles.append(decoder.register_forward_pre_hook(_refuse_keywords, with_kwargs=True))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _take(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        given = {name: kwargs[name] for name in _KEYWORDS if kwargs.get(name) is not None}
        kwargs = {name: value for name, value in kwargs.items() if name not in _KEYWORDS}
        call = current_call()
        if call is not None and call.owner is module:  # an interrupted call, which no hook could close
            set_call(call.outer)
        if "token_ids" in given:
            if kwargs.get("labels") is not None:
                raise ValueError("labels is given with token_ids: it must be None, since no logits are computed")
            _check_float32(given)
            if kwargs.get("attention_mask") is None and not is_sharded(self.model):  # the test would gather the shards
                kwargs |= self._unpacked(kwargs)
            head = self.model.get_output_embeddings()
            set_call(Call(head, owner=module, arguments=given))
            kwargs["return_dict"] = True
        elif given:
            name = next(iter(given))
            raise ValueError(f"{name} is given without token_ids: it must come with the ids that are scored")
        elif gives_float32() and not is_taken(self.model.get_output_embeddings()):
            raise ValueError(_REPLACED)
        if is_sharded(module):
            self._close_last(module)
        call = current_call()
        # the model, or a PEFT tuner around it, which may bypass the model's hooks
        if self._has(call) and self.model in (module, getattr(module, "model", None)):
            kwargs = self._positions.add_to(self.model, args, kwargs)
        return args, kwargs

    def _unpacked(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """position_ids after the check for packed sequences, as keywords."""
        position_ids = refuse_packed(self.model, kwargs.get("position_ids"), kwargs.get("cu_seq_lens_q"))
        return {} if position_ids is None else {"position_ids": position_ids}

    def _make(self, module: nn.Module, args: tuple, output: ModelOutput) -> ModelOutput | None:
        call = current_call()
        if not self._has(call) or call.new is not None:
            return None
        if call.hidden is None:
            if not is_taken(call.head):
                raise ValueError(_REPLACED)
            raise ValueError("the model's forward does not call its output embeddings: it must, to make logits")
        device, dtype = call.hidden.device.type, call.autocast_dtype
        with torch.set_grad_enabled(call.grad_enabled), torch.autocast(device, dtype, enabled=dtype is not None):
            call.new = self._fields(call)
        return with_fields(output, call.new)

    def _close(self, module: nn.Module, args: tuple, output: ModelOutput | None) -> ModelOutput | None:
        call = current_call()
        if not self._has(call):
            return None
        if call.owner is module:
            set_call(call.outer)
        return restored(output, call.new)

    def _has(self, call: Call | None) -> bool:
        return call is not None and call.arguments is not None and call.head is self.model.get_output_embeddings()

    def _fields(self, call: Call) -> dict[str, Any]:
        hidden, weight, bias = linear_of(call.head, call.hidden)
        if type(weight.data) is not Tensor:
            raise TypeError(
                f"the weight of the output embeddings is a {type(weight.data).__name__}: it must be a plain tensor "
                "inside the model's forward (shard the head with the whole model, not by itself)"
            )
        arguments = {
            "hidden": hidden,
            "weight": weight,
            "bias": bias,
            "token_ids": _moved(call.arguments["token_ids"], hidden),
            "temperature": _moved(call.arguments.get("temperature", 1.0), hidden),
            "kept": _moved(call.arguments.get("kept"), hidden),
            "logit_scale": self.after.scale,
            "logit_softcap": self.after.softcap,
        }
        policy_loss = call.arguments.get("policy_loss")
        if policy_loss is None:
            log_probs, entropy = linear_token_logprobs(**arguments, with_entropy=True)
            # Cloned, since FSDP2 adds hooks to them, and a view loses its hook in an in-place operation.
            return {"log_probs": log_probs.clone(), "entropy": entropy.clone()}
        result = fused_linear_policy_loss(
            **arguments, **{name: _moved(value, hidden) for name, value in policy_loss.items()}
        )
        return {"loss": result.loss, "log_probs": result.log_probs, "entropy": result.entropy, "policy_loss": result}

    @torch._dynamo.disable  # FSDP2 compiles a forward in parts, and its own hooks are not compiled either
    def _close_last(self, module: nn.Module) -> None:
        """Move the hook _close behind hooks that FSDP2 added later."""
        hooks = module._forward_hooks
        mine = [number for number, hook in hooks.items() if hook == self._close]
        if mine and next(reversed(hooks)) != mine[0]:
            hooks.move_to_end(mine[0])


def hooks_of(module: nn.Module) -> list[LogProbsHooks]:
    """The LogProbsHooks that enable_log_probs registered on a module."""
    owners = [getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values()]
    return [owner for owner in owners if isinstance(owner, LogProbsHooks)]


def _refuse_keywords(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Pre-hook of the decoder: raises TypeError if model.forward(...) passed the new keywords through."""
    given = [name for name in _KEYWORDS if kwargs.get(name) is not None]
    if given:
        raise TypeError(
            f"{given[0]} was given to model.forward(…), which does not take it: call model(…) instead, and call "
            "enable_log_probs again if a wrapper was added later"
        )


def _check_float32(given: dict[str, Any]) -> None:
    values = {"temperature": given.get("temperature"), **given.get("policy_loss", {})}
    if isinstance(values.get("inputs"), PolicyLossInputs):
        values |= vars(values["inputs"])
    for name, value in values.items():
        if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16):
            raise TypeError(
                f"{name} has dtype {value.dtype}: it must be float32 (FSDP casts the arguments of a model: call "
                "enable_log_probs again with the FSDP model)"
            )


def _moved(value: Any, hidden: Tensor) -> Any:
    """Move a tensor to the model's device. Wrappers do so for model inputs, but never receive these keywords."""
    return value.to(hidden.device) if isinstance(value, (Tensor, PolicyLossInputs, SamplingMask)) else value


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 shards the module."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)
