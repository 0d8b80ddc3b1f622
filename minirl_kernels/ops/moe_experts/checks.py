"""The check of the expert ids of each token, and its error message."""

from __future__ import annotations

from torch import Tensor

from ...common.library import register_check


def experts_message(token: int, experts: Tensor, num_experts: int) -> str:
    """The error for a token that has an expert id out of range."""
    wrong = next(expert for expert in experts[token].tolist() if not 0 <= expert < num_experts)
    return (
        f"routing.experts has the expert {wrong} at row {token}: an expert must be in [0, {num_experts}), E of "
        "gate_up_proj"
    )


def _check_experts(experts, num_experts):
    bad = ((experts < 0) | (experts >= num_experts)).any(-1)
    if bool(bad.any()):
        raise ValueError(experts_message(bad.nonzero()[0].item(), experts, num_experts))


checked_experts = register_check("checked_experts(Tensor experts, SymInt num_experts) -> Tensor", _check_experts)
