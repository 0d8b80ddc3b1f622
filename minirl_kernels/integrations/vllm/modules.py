"""Records inputs and outputs of vLLM's modules, under the names of the same quantities in transformers.

| in vLLM                                 | in transformers                                                        |
|-----------------------------------------|------------------------------------------------------------------------|
| qkv_proj, gate_up_proj                  | q_proj, k_proj, v_proj and gate_proj, up_proj: slices of vLLM's output |
| a norm of (x, residual): (normed, sum)  | a norm of the sum                                                      |
| a decoder layer: (x, residual)          | a decoder layer: x + residual, as input and as output                  |
| gate: logits                            | gate: its first output                                                 |
| experts, without shared experts         | experts                                                                |
| embed_tokens, self_attn, o_proj, mlp, … | the same                                                               |

These modules have no counterpart:
    act_fn, since vLLM's includes the product with the gate;
    attn and rotary_emb, which are no modules in transformers (their result is the input of o_proj);
    experts that add shared experts;
    lm_head, since training computes no logits.
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
_WITHOUT_COUNTERPART = ("act_fn", "attn", "rotary_emb")
Quantity = tuple[str, bool, Tensor]  # (module name in transformers, whether this is its input, values [tokens, ...])


class ModuleRecord:
    """Records inputs and outputs of modules for the first `rows` requests, from a model runner's next forward on."""

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
        """The recorded places. Ends the recording."""
        self._tokens.close()
        for handle in self._handles:
            handle.remove()
        return self._places

    def _before(self, name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        tensor = _input_of(name, module, args, kwargs)
        if tensor is not None:
            for whole in self._names(name):
                self._note(whole, True, tensor)

    def _after(self, name: str, module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        for whole, is_input, tensor in _quantities_in(name, module, output):
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
        # indexing with a mask copies, which is needed since kernels write into their arguments
        values = tensor.detach()[: len(keys)].cpu()[traced].flatten(1)
        place = self._places.setdefault((name, is_input, 0), Place())
        place.add(self._tokens.forward, keys[traced], [values])


def _has_counterpart(name: str, module: nn.Module) -> bool:
    adds_more = isinstance(module, MoERunner) and module.shared_experts is not None
    return not adds_more and name.rpartition(".")[2] not in _WITHOUT_COUNTERPART


def _input_of(name: str, module: nn.Module, args: tuple, kwargs: dict) -> Tensor | None:
    if _LAYER.fullmatch(name):
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        hidden, residual = given["hidden_states"], given["residual"]
        return hidden if residual is None else hidden + residual
    if isinstance(module, RMSNorm) and len(args) > 1:
        return None  # its input is the sum, which is one of its outputs
    first = args[0] if args else kwargs.get("hidden_states")
    return first if isinstance(first, Tensor) else None


def _quantities_in(name: str, module: nn.Module, output: Tensor | tuple) -> Iterator[Quantity]:
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
        yield name, False, output[0]  # output[1] is a linear layer's bias
