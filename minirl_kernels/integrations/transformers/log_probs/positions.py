"""The positions of tokens behind padding on the left, as `generate` has them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


class Positions:
    """Derives position_ids where a call leaves them out, of a model whose forward takes them."""

    def __init__(self, model: PreTrainedModel):
        self._parameters = [name for name in inspect.signature(type(model).forward).parameters if name != "self"]
        self._has_any = "position_ids" in self._parameters and not model.config.is_encoder_decoder

    def add_to(self, model: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """kwargs with position_ids, if attention_mask [B, S] has padding on the left and there are none."""
        given = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        given = {name: value for name, value in given.items() if value is not None}
        tokens = given.get("input_ids", given.get("inputs_embeds"))
        if not self._has_any or "position_ids" in given or tokens is None or not _may_pad_left(given):
            return kwargs
        position_ids = model._prepare_position_ids_for_generation(tokens, given)
        return {**kwargs, "position_ids": position_ids[..., -tokens.shape[1] :]}


def _may_pad_left(given: dict[str, Any]) -> bool:
    """A compiled forward cannot look: it derives positions for every mask, and tokens have the same ones."""
    mask = given.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return False
    return torch.compiler.is_compiling() or bool((mask[:, 0] == 0).any())
