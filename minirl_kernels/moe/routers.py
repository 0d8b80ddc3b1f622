"""The router classes of transformers, and for each the arguments with which moe_routing computes the same result."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops.moe_routing import Routing
from ..versions import require_transformers


class Router(NamedTuple):
    """A router of the model.

    name: path of the router, or of the wrapper around it.
    modules: the router module. An adapter may hold several copies (modules_to_save of PEFT), of which one runs.
    """

    name: str
    modules: tuple[nn.Module, ...]

    @property
    def top_k(self) -> int:
        return self.modules[0].top_k

    @property
    def num_experts(self) -> int:
        return self.modules[0].num_experts

    def options(self, module: nn.Module, inputs: tuple) -> dict[str, Any]:
        """Keyword arguments with which moe_routing computes the same as `module` does now.

        inputs: positional arguments of the module's forward.
        """
        return self._kind.options(module, inputs)

    def logits(self, output) -> Tensor:
        """Router logits [T, E] in the module's output. Raises TypeError, naming the class, for an unknown form."""
        self._check(output)
        return self._kind.output.logits(output)

    def experts(self, output) -> Tensor:
        """[T, K] int64: the experts chosen by the module, or by a context around it. Raises what logits raises."""
        self._check(output)
        return self._kind.output.experts(output, self.top_k)

    def replaced(self, output, routing: Routing):
        """The module's output with the weights and experts of `routing`."""
        return self._kind.output.replaced(output, routing)

    def _check(self, output) -> None:
        if not self._kind.output.fits(output, self.top_k, self.num_experts):
            raise TypeError(
                f"{self.name} ({_class(self.modules[0]).__name__}) returns {_described(output)}: it must return "
                f"{self._kind.output.form}, as it does in later releases of transformers"
            )

    @property
    def _kind(self) -> _Kind:
        return _KINDS[_class(self.modules[0]).__name__]


class _Triple:
    """Output (logits [T, E], weights [T, K], experts [T, K])."""

    form = "(logits [T, E], weights [T, K], experts [T, K])"

    @staticmethod
    def fits(output, top_k: int, num_experts: int) -> bool:
        if not _are_matrices(output, (num_experts, top_k, top_k)):
            return False
        logits, weights, experts = output
        return logits.is_floating_point() and weights.is_floating_point() and experts.dtype == torch.int64

    @staticmethod
    def logits(output) -> Tensor:
        return output[0]

    @staticmethod
    def experts(output, top_k: int) -> Tensor:
        return output[2]

    @staticmethod
    def replaced(output, routing: Routing):
        logits, weights, _ = output
        return logits, routing.weights.to(weights.dtype), routing.experts


class _Scores:
    """Llama4's output (scores [T, E], logits [T, E]). scores holds the weights of the chosen experts, otherwise 0."""

    form = "(scores [T, E], logits [T, E])"

    @staticmethod
    def fits(output, top_k: int, num_experts: int) -> bool:
        return _are_matrices(output, (num_experts,) * 2) and all(part.is_floating_point() for part in output)

    @staticmethod
    def logits(output) -> Tensor:
        return output[1]

    @staticmethod
    def experts(output, top_k: int) -> Tensor:
        return output[0].topk(top_k, dim=1).indices

    @staticmethod
    def replaced(output, routing: Routing):
        scores, logits = output
        return torch.zeros_like(scores).scatter(1, routing.experts, routing.weights.to(scores.dtype)), logits


class _Kind(NamedTuple):
    options: Callable[[nn.Module, tuple], dict[str, Any]]
    output: type[_Triple] | type[_Scores] = _Triple


def _softmax_as_configured(module, _) -> dict[str, Any]:
    return {"norm_topk_prob": module.norm_topk_prob}


def _softmax_over_chosen(*_) -> dict[str, Any]:
    return {"norm_topk_prob": True}


def _softmax_over_all(*_) -> dict[str, Any]:
    return {"norm_topk_prob": False}


def _softmax_and_bias(module, _) -> dict[str, Any]:
    """ERNIE-4.5. moe_routing has no lower bound for the divisor; at 1e-12 it only prevents a division by zero."""
    if module.norm_min > 1e-6:
        raise ValueError(f"moe_norm_min is {module.norm_min}: it must be at most 1e-6 for routing replay")
    return {"norm_topk_prob": True, "correction_bias": module.moe_statics.e_score_correction_bias.flatten()}


def _softmax_greedy(module, _) -> dict[str, Any]:
    """DeepSeek-V2-Lite."""
    if module.topk_method != "greedy":
        raise ValueError(
            f"topk_method is {module.topk_method!r}: it must be 'greedy' for routing replay, which ranks "
            "groups by their two best experts"
        )
    return {"norm_topk_prob": False, "scale": module.routed_scaling_factor}


def _sigmoid_by_groups(module, _) -> dict[str, Any]:
    """DeepSeek-V3."""
    return {
        "scoring": "sigmoid",
        "norm_topk_prob": module.norm_topk_prob,
        "correction_bias": module.e_score_correction_bias,
        "num_groups": module.num_group,
        "top_k_groups": module.topk_group,
        "scale": module.routed_scaling_factor,
    }


def _sigmoid_and_bias(module, _) -> dict[str, Any]:
    return {"scoring": "sigmoid", "correction_bias": module.e_score_correction_bias}


def _sigmoid_and_given_bias(_, inputs) -> dict[str, Any]:
    """MiniMax-M2. The block around the router holds the bias and passes it as the second argument."""
    return {"scoring": "sigmoid", "correction_bias": inputs[1]}


def _scaled_sigmoid_and_given_bias(factor: str) -> Callable:
    return lambda module, inputs: {**_sigmoid_and_given_bias(module, inputs), "scale": getattr(module, factor)}


def _sigmoid_over_all(*_) -> dict[str, Any]:
    return {"scoring": "sigmoid", "norm_topk_prob": False}


def _named(kind: _Kind, names: str) -> dict[str, _Kind]:
    return dict.fromkeys(names.split(), kind)


# By exact class name, since a subclass may compute differently. Each was compared with its forward in transformers 5.
_KINDS: dict[str, _Kind] = {
    **_named(
        _Kind(_softmax_as_configured),
        "FlexOlmoTopKRouter MellumTopKRouter OlmoeTopKRouter Qwen2MoeTopKRouter Qwen3MoeTopKRouter Qwen3NextTopKRouter "
        "Qwen3OmniMoeTalkerTextTopKRouter Qwen3OmniMoeThinkerTextTopKRouter",
    ),
    **_named(
        _Kind(_softmax_over_chosen),
        "AriaTextTopKRouter GptOssTopKRouter GraniteMoeHybridTopKRouter GraniteMoeSWATopKRouter "
        "GraniteMoeSharedTopKRouter GraniteMoeTopKRouter HunYuanMoEV1Gate MiniMaxTopKRouter MixtralTopKRouter "
        "Qwen3OmniMoeTextTopKRouter Qwen3VLMoeTextTopKRouter Qwen3_5MoeTopKRouter",
    ),
    **_named(_Kind(_softmax_over_all), "JambaTopKRouter"),
    **_named(_Kind(_softmax_and_bias), "Ernie4_5_MoeTopKRouter Ernie4_5_VLMoeMoeTopKRouter"),
    **_named(_Kind(_softmax_greedy), "DeepseekOcr2TextTopkRouter DeepseekV2TopkRouter UnlimitedOcrTextTopkRouter"),
    **_named(
        _Kind(_sigmoid_by_groups),
        "AXK1TopkRouter BailingHybridTopkRouter DeepseekV32TopkRouter DeepseekV3TopkRouter Dots1TopkRouter "
        "Dots3NoteTextTopkRouter ExaoneMoeTopkRouter Glm4MoeLiteTopkRouter Glm4MoeTopkRouter Glm4vMoeTextTopkRouter "
        "Glm5NextTextTopkRouter GlmMoeDsaTopkRouter HYV4TopkRouter KimiLinearTopkRouter MiMoV2FlashTopkRouter "
        "NemotronHTopkRouter SolarOpenTopkRouter",
    ),
    **_named(_Kind(_sigmoid_and_bias), "MiniMaxM3VLTopKRouter Step3p7TopKRouter"),
    **_named(_Kind(_sigmoid_and_given_bias), "MiniMaxM2TopKRouter"),
    **_named(_Kind(_scaled_sigmoid_and_given_bias("route_scale")), "AfmoeTokenChoiceRouter"),
    **_named(_Kind(_scaled_sigmoid_and_given_bias("router_scaling_factor")), "HYV3TopKRouter"),
    **_named(_Kind(_sigmoid_over_all, _Scores), "Llama4Router"),
}


def routers(model: nn.Module) -> list[Router]:
    """The model's routers in the order of its layers.

    Raises ValueError if the model has no router, or one that cannot be replayed; the message names the module.
    Raises ImportError for a transformers older than the oldest supported one.
    """
    found = []
    for name, module in model.named_modules():
        # not getattr, since a wrapper forwards attribute access to the module inside it
        if not isinstance(module._modules.get("experts"), nn.Module):
            continue
        known = {child: inner for child, inner in _known(module).items() if inner}
        if len(known) != 1:
            children = ", ".join(f"{child} ({_class(kind).__name__})" for child, kind in module.named_children())
            raise ValueError(
                f"model has experts in {name or 'its root'} ({type(module).__name__}) whose router cannot be replayed: "
                f"its children are {children}, of which one must be a {', '.join(sorted(_KINDS))} of transformers"
            )
        ((child, inner),) = known.items()
        found.append(Router(f"{name}.{child}" if name else child, inner))
    if not found:
        raise ValueError(f"model is a {type(model).__name__} without experts: it must have routers to record or replay")
    require_transformers()
    return found


def moe_layer_indices(model: nn.Module) -> list[int]:
    """The decoder layer number of each MoE layer, for formats that have a row for every decoder layer.

    Raises what routers raises, and ValueError if a router's name does not contain layers.<number>.
    """
    names = [router.name for router in routers(model)]
    numbers = [re.search(r"(?:^|\.)layers\.(\d+)\.", name) for name in names]
    for name, number in zip(names, numbers, strict=True):
        if number is None:
            raise ValueError(f"model has the router {name}: its name must have layers.<number>")
    return [int(number[1]) for number in numbers]


def _known(block: nn.Module) -> dict[str, tuple[nn.Module, ...]]:
    """{child of the block: known routers in it}. A wrapper such as LoRA or torch.compile contains the router."""
    return {
        name: tuple(
            module
            for module in child.modules()
            if _class(module).__name__ in _KINDS and _class(module).__module__.startswith("transformers.")
        )
        for name, child in block.named_children()
    }


def _class(module: nn.Module) -> type:
    """The class from transformers. Parametrization and FSDP2 replace a module's class by a subclass made by torch."""
    return next((kind for kind in type(module).__mro__ if not kind.__module__.startswith("torch.")), type(module))


def _are_matrices(output, widths: tuple[int, ...]) -> bool:
    return (
        isinstance(output, tuple)
        and len(output) == len(widths)
        and all(isinstance(part, Tensor) and part.dim() == 2 for part in output)
        and all(part.shape[1] == width for part, width in zip(output, widths, strict=True))
    )


def _described(output) -> str:
    parts = output if isinstance(output, tuple) else (output,)
    return ", ".join(
        f"{part.dtype} {list(part.shape)}" if isinstance(part, Tensor) else type(part).__name__ for part in parts
    )
