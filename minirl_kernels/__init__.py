"""Kernels for training language models by reinforcement learning: MiniRL's policy loss, fused."""

import importlib.metadata

from .batch_invariant import batch_invariant_mode
from .config import PolicyLossConfig
from .moe import RoutedExperts, moe_layer_indices, record_routing, replay_routing
from .ops.attention import attention
from .ops.elementwise import gelu, mish, sigmoid, silu, softplus
from .ops.fused_linear_policy_loss import fused_linear_policy_loss
from .ops.fused_policy_loss import fused_policy_loss
from .ops.linear_token_logprobs import linear_token_logprobs
from .ops.matmul import bmm, linear, matmul
from .ops.mean import mean, sum
from .ops.moe_experts import PackedExperts, moe_experts, pack_experts
from .ops.moe_routing import Routing, moe_routing
from .ops.policy_loss import PolicyLossMetrics, PolicyLossOutput, group_advantages, policy_loss
from .ops.rms_norm import rms_norm
from .ops.softmax import log_softmax, softmax
from .ops.token_logprobs import token_logprobs
from .sampling_mask import SamplingMask

__all__ = [
    "PackedExperts",
    "PolicyLossConfig",
    "PolicyLossMetrics",
    "PolicyLossOutput",
    "RoutedExperts",
    "Routing",
    "SamplingMask",
    "attention",
    "batch_invariant_mode",
    "bmm",
    "fused_linear_policy_loss",
    "fused_policy_loss",
    "gelu",
    "group_advantages",
    "linear",
    "linear_token_logprobs",
    "log_softmax",
    "matmul",
    "mean",
    "mish",
    "moe_experts",
    "moe_layer_indices",
    "moe_routing",
    "pack_experts",
    "policy_loss",
    "record_routing",
    "replay_routing",
    "rms_norm",
    "sigmoid",
    "silu",
    "softmax",
    "softplus",
    "sum",
    "token_logprobs",
]


def __getattr__(name: str) -> str:
    """__version__, of the installed distribution; read when asked, since a checkout need not be installed."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return importlib.metadata.version("minirl-kernels")
    except importlib.metadata.PackageNotFoundError as error:
        raise AttributeError("minirl_kernels has no __version__: it is not installed") from error
