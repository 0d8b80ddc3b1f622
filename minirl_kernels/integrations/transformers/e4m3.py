"""A copy of a model that rounds like an FP8 inference engine, on any hardware (fake quantisation to e4m3).

Weights have one scale per output channel and are rounded at each refresh. Activations have one scale per token,
computed on the fly. vLLM does the same for `quantization="fp8"`. FP8 hardware multiplies e4m3 numbers and scales the
product. Here the scaled numbers are multiplied, in the model's dtype. bfloat16 rounds them once more, by a relative
2**-9; the error of e4m3 is 2**-4.

Linear layers and experts are rounded. As in FP8 engines, some parts are not:
    embeddings and norms, which have no matmul;
    the head, since its error would enter every logit;
    routers and gates, since their errors would send tokens to other experts, and they are small.
Nothing is rounded between the two matmuls of experts, since an experts function has no hook there.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max  # 448


def round_to_e4m3(values: Tensor, dim: int) -> Tensor:
    """Round `values` to the nearest e4m3 numbers times a scale per slice along `dim`: max |slice| / 448, float32.

    values: any shape and float dtype; the result has the same. A slice with an inf or a NaN becomes NaN.
    """
    wide = values.float()
    scale = wide.abs().amax(dim, keepdim=True) / E4M3_MAX
    scale = torch.where(scale == 0, 1.0, scale)
    return ((wide / scale).to(torch.float8_e4m3fn).float() * scale).to(values.dtype)


class E4M3Copy:
    """`model` is the rounded copy; `refresh()` rounds the current weights of the source again.

    source: a causal language model of transformers. It is not changed. The copy shares all parts that are not rounded.
    Raises ValueError if there is nothing to round.
    """

    def __init__(self, source: PreTrainedModel):
        self.source = source
        rounded = _rounded_weights(source)
        if not rounded:
            raise ValueError(f"a {type(source).__name__} has no nn.Linear and no experts: there is nothing to quantise")
        weights = {f"{module}.{name}" for module, names in rounded.items() for name in names}
        kept = [weight for name, weight in source.named_parameters() if name not in weights]
        self.model = copy.deepcopy(source, {id(tensor): tensor for tensor in [*kept, *source.buffers()]})
        self._weights = []
        for module_name, names in rounded.items():
            module, twin = source.get_submodule(module_name), self.model.get_submodule(module_name)
            twin.register_forward_pre_hook(_round_input, with_kwargs=True)
            self._weights += [
                (getattr(module, name), getattr(twin, name).requires_grad_(False), dim) for name, dim in names.items()
            ]
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the current weights of the source into the copy."""
        for weight, twin, dim in self._weights:
            twin.copy_(round_to_e4m3(weight, dim))


def _rounded_weights(model: PreTrainedModel) -> dict[str, dict[str, int]]:
    """{module: {weight: its input dimension}} of all weights to round."""
    gates = {
        id(child)
        for module in model.modules()
        if isinstance(getattr(module, "experts", None), nn.Module)
        for child in module.children()
    }
    untouched = gates | {id(model.get_output_embeddings())}
    found = {}
    for name, module in model.named_modules():
        # transformers' decorator for experts sets this attribute
        if hasattr(module, "is_transposed"):
            dim = -2 if module.is_transposed else -1
            weights = {key: dim for key, weight in module.named_parameters(recurse=False) if weight.dim() == 3}
            found[name] = weights
        elif isinstance(module, nn.Linear) and id(module) not in untouched:
            found[name] = {"weight": -1}
    return found


def _round_input(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Round the hidden states, the first positional or keyword argument of a module."""
    if args:
        return (round_to_e4m3(args[0], -1), *args[1:]), kwargs
    first = next(iter(kwargs))
    return args, {**kwargs, first: round_to_e4m3(kwargs[first], -1)}
