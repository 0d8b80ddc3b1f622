"""A copy of a model that rounds as an FP8 inference engine does: its matmuls see e4m3 numbers, on any hardware.

Weights have one scale per output channel and are rounded once per refresh; activations have one scale per token, found
as they come (vLLM calls both so for `quantization="fp8"`). The products are then those of the dequantised numbers, in
the dtype that the model computes in, where FP8 hardware multiplies first and scales afterwards: bfloat16 rounds the
dequantised numbers once more, by 2**-9 of their size against the 2**-4 of e4m3.

Linear layers and experts are rounded. Left as they are, as engines leave them: embeddings and norms, which are no
matmuls; the head, whose error would go into every logit undamped; routers and gates, whose error would send tokens to
other experts, and which are small. Between the two matmuls of experts nothing is rounded: an experts function gets
and returns hidden states, and what it holds between them is its own.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max  # 448


def round_to_e4m3(values: Tensor, dim: int) -> Tensor:
    """`values` as the nearest e4m3 numbers times a scale for each slice along `dim`, max |slice| / 448.

    Any shape and float dtype, which the result has too; scales are float32. A slice with an inf or a NaN becomes NaN.
    """
    wide = values.float()
    scale = wide.abs().amax(dim, keepdim=True) / E4M3_MAX
    scale = torch.where(scale == 0, 1.0, scale)
    return ((wide / scale).to(torch.float8_e4m3fn).float() * scale).to(values.dtype)


class E4M3Copy:
    """`model` is the copy; `refresh()` gives it the weights that the source has now.

    source: a causal language model of transformers, which stays as it is. What is not rounded, the copy shares with it.
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
        """Round the source's weights again, as they are now."""
        for weight, twin, dim in self._weights:
            twin.copy_(round_to_e4m3(weight, dim))


def _rounded_weights(model: PreTrainedModel) -> dict[str, dict[str, int]]:
    """{module: {weight: its dimension of inputs}} of what is rounded."""
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
    """The hidden states come first, by place or by name."""
    if args:
        return (round_to_e4m3(args[0], -1), *args[1:]), kwargs
    first = next(iter(kwargs))
    return args, {**kwargs, first: round_to_e4m3(kwargs[first], -1)}
