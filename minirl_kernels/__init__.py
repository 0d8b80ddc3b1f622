"""Kernels for training language models by reinforcement learning: MiniRL's policy loss, fused."""

import importlib.metadata

from . import layers
from .batch_invariant import batch_invariant_mode
from .config import PolicyLossConfig
from .correction import Correction
from .layers import *  # noqa: F403
from .moe import RoutedExperts, moe_layer_indices, record_routing, replay_routing
from .ops.fused_linear_policy_loss import fused_linear_policy_loss
from .ops.fused_policy_loss import fused_policy_loss
from .ops.linear_token_logprobs import linear_token_logprobs
from .ops.moe_experts import PackedExperts, moe_experts, pack_experts
from .ops.moe_routing import Routing, moe_routing
from .ops.policy_loss import PolicyLossInputs, PolicyLossMetrics, PolicyLossOutput, group_advantages, policy_loss
from .ops.token_logprobs import token_logprobs
from .sampling_mask import SamplingMask

__all__ = [  # noqa: RUF022
    # losses
    "Correction",
    "PolicyLossConfig",
    "PolicyLossInputs",
    "PolicyLossMetrics",
    "PolicyLossOutput",
    "fused_linear_policy_loss",
    "fused_policy_loss",
    "group_advantages",
    "policy_loss",
    # log-probabilities
    "SamplingMask",
    "linear_token_logprobs",
    "token_logprobs",
    # routing
    "RoutedExperts",
    "Routing",
    "moe_layer_indices",
    "moe_routing",
    "record_routing",
    "replay_routing",
    # experts
    "PackedExperts",
    "moe_experts",
    "pack_experts",
    # the mode
    "batch_invariant_mode",
]
__all__ += layers.__all__


def __getattr__(name: str) -> str:
    """__version__ of the installed distribution, read on first use, because a checkout may not be installed."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return importlib.metadata.version("minirl-kernels")
    except importlib.metadata.PackageNotFoundError as error:
        raise AttributeError("minirl_kernels has no __version__: it is not installed") from error
