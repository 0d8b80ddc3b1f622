"""The output of a model with declared fields of log-probabilities: wrappers rebuild an output from its fields."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from ....ops.policy_loss import PolicyLossOutput

_FIELDS = {"log_probs": Tensor, "entropy": Tensor, "policy_loss": PolicyLossOutput}


def with_fields(output: ModelOutput, new: dict[str, Any]) -> ModelOutput:
    """`output` without logits and loss, with `new`: of a dataclass that inherits the output's own."""
    kept = {name: value for name, value in output.items() if name not in ("logits", "loss")}
    return _rebuilt(type(output), {**kept, **new})


def restored(output: Any, new: dict[str, Any] | None) -> ModelOutput | None:
    """`output` with the fields of `new` as they were, if a wrapper has cast them (FSDP2 with output_dtype)."""
    log_probs = getattr(output, "log_probs", None)
    if new is None or log_probs is None or log_probs.dtype == new["log_probs"].dtype:
        return None
    return type(output)(**{**output, **new})


def _rebuilt(base: type[ModelOutput], values: dict[str, Any]) -> ModelOutput:
    return _output_class(base)(**values)


_CLASSES: dict[type[ModelOutput], type[ModelOutput]] = {}


@torch._dynamo.assume_constant_result  # torch.compile cannot trace how a class is made
def _output_class(base: type[ModelOutput]) -> type[ModelOutput]:
    if base not in _CLASSES:
        fields = [(name, kind | None, None) for name, kind in _FIELDS.items()]
        # the class has no name to be imported by: a pickle holds the model's own class instead
        namespace = {"__reduce__": lambda self: (_rebuilt, (base, dict(self)))}
        _CLASSES[base] = dataclasses.make_dataclass(
            f"{base.__name__}WithLogProbs", fields, bases=(base,), namespace=namespace
        )
    return _CLASSES[base]
