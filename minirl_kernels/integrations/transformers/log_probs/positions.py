"""Derives position_ids for batches padded on the left, as `generate` does."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


class Positions:
    """Adds position_ids to a call without them, if the model's forward takes them."""

    def __init__(self, model: PreTrainedModel):
        self._parameters = [name for name in inspect.signature(type(model).forward).parameters if name != "self"]
        self._has_any = "position_ids" in self._parameters and not model.config.is_encoder_decoder

    def add_to(self, model: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """kwargs, with position_ids added if attention_mask [B, S] has padding on the left and none are given."""
        given = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        given = {name: value for name, value in given.items() if value is not None}
        tokens = given.get("input_ids", given.get("inputs_embeds"))
        if not self._has_any or "position_ids" in given or tokens is None or not _may_pad_left(given):
            return kwargs
        position_ids = model._prepare_position_ids_for_generation(tokens, given)
        return {**kwargs, "position_ids": position_ids[..., -tokens.shape[1] :]}


def _may_pad_left(given: dict[str, Any]) -> bool:
    """Whether attention_mask may have padding on the left. A compiled forward cannot read it, so it derives always."""
    mask = given.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return False
    return torch.compiler.is_compiling() or bool((mask[:, 0] == 0).any())
