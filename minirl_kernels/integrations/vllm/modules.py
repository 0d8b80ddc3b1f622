"""What vLLM's modules take in and give out, under the names that the same quantities have in transformers.

| in vLLM                                 | in transformers                                                       |
|-----------------------------------------|-----------------------------------------------------------------------|
| qkv_proj, gate_up_proj                  | q_proj, k_proj, v_proj and gate_proj, up_proj: parts of what it makes |
| a norm of (x, residual): (normed, sum)  | a norm of the sum                                                     |
| a decoder layer: (x, residual)          | a decoder layer: x + residual, which it takes in as well              |
| gate: logits                            | gate: the first of what it makes                                      |
| experts, without shared ones            | experts                                                               |
| embed_tokens, self_attn, o_proj, mlp, … | the same                                                              |

Without a counterpart: act_fn (the product is part of it), attn and rotary_emb (no modules there, what they make is the
input of o_proj), experts that add shared ones, lm_head (training makes no logits).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from functools import partial

from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.layer import MoERunner
from vllm.model_executor.layers.layernorm import RMSNorm

from ...discrepancy.forwards import STRIDE
from ...discrepancy.modules import Place, PlaceName
from .tokens import Tokens

_LAYER = re.compile(r"(?:.*\.)?layers\.\d+")
_NOWHERE = ("act_fn", "attn", "rotary_emb")
Quantity = tuple[str, bool, Tensor]  # name of a module in transformers, whether it is its input, [tokens, ...]


class ModuleRecord:
    """Notes what a model runner's modules make of the first `rows` requests, from the next forward on."""

    def __init__(self, runner, rows: int):
        self._rows = rows
        self._tokens = Tokens(runner)
        self._places: dict[PlaceName, Place] = {}
        model = runner.get_model()
        self._parts: dict[str, list[str]] = getattr(model, "packed_modules_mapping", {})
        self._handles = []
        for name, module in model.named_modules():
            if name and _has_counterpart(name, module):
                self._handles.append(module.register_forward_pre_hook(partial(self._before, name), with_kwargs=True))
                self._handles.append(module.register_forward_hook(partial(self._after, name)))

    def take(self) -> dict[PlaceName, Place]:
        """All that was noted; ends the record."""
        self._tokens.close()
        for handle in self._handles:
            handle.remove()
        return self._places

    def _before(self, name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        tensor = _taken_in(name, module, args, kwargs)
        if tensor is not None:
            for whole in self._names(name):
                self._note(whole, True, tensor)

    def _after(self, name: str, module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        for whole, is_input, tensor in _given_out(name, module, output):
            names = self._names(whole)
            sizes = module.output_partition_sizes if len(names) > 1 else [tensor.shape[-1]]
            for part, values in zip(names, tensor.split(sizes, -1), strict=True):
                self._note(part, is_input, values)

    def _names(self, name: str) -> list[str]:
        parent, dot, own = name.rpartition(".")
        return [parent + dot + part for part in self._parts.get(own, [own])]

    def _note(self, name: str, is_input: bool, tensor: Tensor) -> None:
        keys = self._tokens.keys
        if tensor.dim() < 2 or len(tensor) < len(keys):
            return
        traced = keys < self._rows * STRIDE
        # taken out, and so copied: kernels write into their arguments
        values = tensor.detach()[: len(keys)].cpu()[traced].flatten(1)
        place = self._places.setdefault((name, is_input, 0), Place())
        place.add(self._tokens.forward, keys[traced], [values])


def _has_counterpart(name: str, module: nn.Module) -> bool:
    adds_more = isinstance(module, MoERunner) and module.shared_experts is not None
    return not adds_more and name.rpartition(".")[2] not in _NOWHERE


def _taken_in(name: str, module: nn.Module, args: tuple, kwargs: dict) -> Tensor | None:
    if _LAYER.fullmatch(name):
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        hidden, residual = given["hidden_states"], given["residual"]
        return hidden if residual is None else hidden + residual
    if isinstance(module, RMSNorm) and len(args) > 1:
        return None  # it gives out the sum
    first = args[0] if args else kwargs.get("hidden_states")
    return first if isinstance(first, Tensor) else None


def _given_out(name: str, module: nn.Module, output: Tensor | tuple) -> Iterator[Quantity]:
    if isinstance(output, Tensor):
        yield name, False, output
    elif _LAYER.fullmatch(name):
        hidden, residual = output
        yield name, False, hidden + residual
    elif isinstance(module, RMSNorm):
        normed, total = output
        yield name, True, total
        yield name, False, normed
    elif isinstance(output[0], Tensor):
        yield name, False, output[0]  # a linear layer's bias comes behind it
