"""Output classes with the fields log_probs, entropy and policy_loss, since wrappers rebuild outputs from fields."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from ....ops.policy_loss import PolicyLossOutput

_FIELDS = {"log_probs": Tensor, "entropy": Tensor, "policy_loss": PolicyLossOutput}


def with_fields(output: ModelOutput, new: dict[str, Any]) -> ModelOutput:
    """`output` without logits and loss, with the fields `new`, as a subclass of the output's class."""
    kept = {name: value for name, value in output.items() if name not in ("logits", "loss")}
    return _rebuilt(type(output), {**kept, **new})


def restored(output: Any, new: dict[str, Any] | None) -> ModelOutput | None:
    """`output` with the original fields `new`, if a wrapper has cast them (FSDP2 with output_dtype); otherwise None."""
    log_probs = getattr(output, "log_probs", None)
    if new is None or log_probs is None or log_probs.dtype == new["log_probs"].dtype:
        return None
    return type(output)(**{**output, **new})


def _rebuilt(base: type[ModelOutput], values: dict[str, Any]) -> ModelOutput:
    return _output_class(base)(**values)


_CLASSES: dict[type[ModelOutput], type[ModelOutput]] = {}


@torch._dynamo.assume_constant_result  # torch.compile cannot trace the creation of a class
def _output_class(base: type[ModelOutput]) -> type[ModelOutput]:
    if base not in _CLASSES:
        fields = [(name, kind | None, None) for name, kind in _FIELDS.items()]
        # A pickle stores the model's output class, since this class cannot be imported by name.
        namespace = {"__reduce__": lambda self: (_rebuilt, (base, dict(self)))}
        _CLASSES[base] = dataclasses.make_dataclass(
            f"{base.__name__}WithLogProbs", fields, bases=(base,), namespace=namespace
        )
    return _CLASSES[base]
