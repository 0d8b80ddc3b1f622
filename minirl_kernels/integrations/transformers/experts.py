"""`experts_implementation="minirl"`: computes the experts of transformers' models by moe_experts.

transformers has one function per implementation, for the experts of all models. The attributes set by its class
decorator, the gate and the weights decide whether moe_experts computes the same result. Other experts are refused in
their first forward, since transformers calls the function no earlier. It never calls the function for experts without
the decorator.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import type_before_parametrizations
from transformers.activations import SiLUActivation
from transformers.integrations.moe import _default_apply_gate

from ...common.checks import FLOAT_DTYPES
from ...ops.moe_experts import moe_experts

# {attribute of experts: (value that moe_experts supports, description of the other value)}
_LAYOUT = {
    "has_gate": (True, "have no gate (has_gate)"),
    "is_concatenated": (True, "interleave the rows of gate and up (is_concatenated)"),
    "is_transposed": (False, "store their weights transposed (is_transposed)"),
    "has_bias": (False, "have biases (has_bias)"),
    "has_post_expert_norm": (False, "have a norm after each expert (has_post_expert_norm)"),
    "_is_expert_parallel": (False, "are spread over ranks (expert parallelism)"),
}


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """moe_experts for an experts module of transformers, with the signature of experts implementations.

    self: SiLU-gated experts in transformers' default layout: gate_up_proj [E, 2 I, H], gate first, and down_proj
        [E, H, I], float32, bfloat16 or float16. hidden_states: [T, H], cast to the dtype of gate_up_proj (autocast
        casts both). top_k_index, top_k_weights: [T, K], as the routing of moe_experts.
    Returns [T, H] of the dtype of hidden_states. It is differentiable by hidden_states, top_k_weights and the weights.
    Raises TypeError that names the module's class and its unsupported features. Raises what moe_experts raises.
    """
    # Read once, since a parametrised weight is computed at every access.
    gate_up_proj, down_proj = (getattr(self, name, None) for name in ("gate_up_proj", "down_proj"))
    unsupported = _unsupported(self, gate_up_proj, down_proj)
    if unsupported:
        kind = type_before_parametrizations(self)
        raise TypeError(
            f"experts_implementation is 'minirl': it must be another for {kind.__module__}.{kind.__qualname__}, whose "
            f"experts {', '.join(unsupported)}"
        )
    out = moe_experts(hidden_states.to(gate_up_proj.dtype), (top_k_weights, top_k_index), gate_up_proj, down_proj)
    return out.to(hidden_states.dtype)


def _unsupported(experts: nn.Module, gate_up_proj, down_proj) -> list[str]:
    """Features of the experts that moe_experts does not support."""
    # An older transformers lacks some attributes; the supported value is then the only one.
    found = [
        feature for name, (supported, feature) in _LAYOUT.items() if getattr(experts, name, supported) != supported
    ]
    if type(experts)._apply_gate is not _default_apply_gate or "_apply_gate" in experts.__dict__:
        found.append("gate in a way of their own (_apply_gate)")
    elif experts.act_fn is not F.silu and type(experts.act_fn) not in (nn.SiLU, SiLUActivation):
        found.append(f"have the activation {type(experts.act_fn).__name__}")
    for name, weight in (("gate_up_proj", gate_up_proj), ("down_proj", down_proj)):
        if not isinstance(weight, Tensor):
            found.append(f"have no {name}")
        elif type(weight.data) is not Tensor or weight.dtype not in FLOAT_DTYPES:
            found.append(f"have a {name} that is a {type(weight.data).__name__} of {weight.dtype}")
    return found
