"""The routers of transformers' mixture-of-experts models, and what each of them computes in terms of moe_routing."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn


class Router(NamedTuple):
    """A module whose forward returns (logits [T, E], weights [T, K], experts [T, K])."""

    name: str
    module: nn.Module

    @property
    def top_k(self) -> int:
        return self.module.top_k

    @property
    def num_experts(self) -> int:
        return self.module.weight.shape[0]

    def options(self) -> dict[str, Any]:
        """The keyword arguments of moe_routing that make it compute what the module does, as it stands now."""
        return _OPTIONS[type(self.module).__name__](self.module)


def _softmax_as_configured(module) -> dict[str, Any]:
    return {"norm_topk_prob": module.norm_topk_prob}


def _softmax_of_the_chosen(module) -> dict[str, Any]:
    return {"norm_topk_prob": True}


def _softmax_of_all(module) -> dict[str, Any]:
    return {"norm_topk_prob": False}


def _sigmoid_by_groups(module) -> dict[str, Any]:
    """DeepSeek-V3's."""
    return {
        "scoring": "sigmoid",
        "norm_topk_prob": module.norm_topk_prob,
        "correction_bias": module.e_score_correction_bias,
        "num_groups": module.num_group,
        "top_k_groups": module.topk_group,
        "scale": module.routed_scaling_factor,
    }


def _sigmoid_and_bias(module) -> dict[str, Any]:
    return {"scoring": "sigmoid", "correction_bias": module.e_score_correction_bias}


def _named(options: Callable, names: str) -> dict[str, Callable]:
    return dict.fromkeys(names.split(), options)


# By class: a subclass may well compute something else. Each has been compared with its forward in transformers 5.
_OPTIONS: dict[str, Callable[[nn.Module], dict[str, Any]]] = {
    **_named(
        _softmax_as_configured,
        "FlexOlmoTopKRouter MellumTopKRouter OlmoeTopKRouter Qwen2MoeTopKRouter Qwen3MoeTopKRouter Qwen3NextTopKRouter "
        "Qwen3OmniMoeTalkerTextTopKRouter Qwen3OmniMoeThinkerTextTopKRouter",
    ),
    **_named(
        _softmax_of_the_chosen,
        "AriaTextTopKRouter GptOssTopKRouter GraniteMoeHybridTopKRouter GraniteMoeSharedTopKRouter "
        "GraniteMoeTopKRouter MiniMaxTopKRouter MixtralTopKRouter Qwen3VLMoeTextTopKRouter Qwen3_5MoeTopKRouter",
    ),
    **_named(_softmax_of_all, "JambaTopKRouter"),
    **_named(
        _sigmoid_by_groups,
        "DeepseekV32TopkRouter DeepseekV3TopkRouter Dots1TopkRouter ExaoneMoeTopkRouter Glm4MoeLiteTopkRouter "
        "Glm4MoeTopkRouter Glm4vMoeTextTopkRouter GlmMoeDsaTopkRouter KimiLinearTopkRouter MiMoV2FlashTopkRouter "
        "NemotronHTopkRouter SolarOpenTopkRouter",
    ),
    **_named(_sigmoid_and_bias, "MiniMaxM3VLTopKRouter Step3p7TopKRouter"),
}


def routers(model: nn.Module) -> list[Router]:
    """The model's routers in the order of its layers.

    Raises ValueError that names the module where experts have a router that cannot be replayed, or there is none.
    """
    found = []
    for name, module in model.named_modules():
        if not isinstance(getattr(module, "experts", None), nn.Module):
            continue
        known = [child for child, kind in module.named_children() if type(kind).__name__ in _OPTIONS]
        if len(known) != 1:
            children = ", ".join(f"{child} ({type(kind).__name__})" for child, kind in module.named_children())
            raise ValueError(
                f"model has experts in {name or 'its root'} ({type(module).__name__}) whose router cannot be replayed: "
                f"its children are {children}, of which one must be a {', '.join(sorted(_OPTIONS))}"
            )
        path = f"{name}.{known[0]}" if name else known[0]
        found.append(Router(path, module.get_submodule(known[0])))
    if not found:
        raise ValueError(f"model is a {type(model).__name__} without experts: it must have routers to record or replay")
    return found


def moe_layer_indices(model: nn.Module) -> list[int]:
    """The decoder layer of each MoE layer, for readers of formats that count every decoder layer."""
    names = [router.name for router in routers(model)]
    numbers = [re.search(r"(?:^|\.)layers\.(\d+)\.", name) for name in names]
    for name, number in zip(names, numbers, strict=True):
        if number is None:
            raise ValueError(f"model has the router {name}: its name must have layers.<number>")
    return [int(number[1]) for number in numbers]
