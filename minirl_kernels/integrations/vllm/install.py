"""Where our parts take the place of vLLM's on a CPU: all of it, by vLLM's own registries where they reach."""

from __future__ import annotations

import functools

import vllm
from vllm.model_executor.layers import utils as gemms
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from . import layers
from .settings import prepare

_KNOWN = "0.32."


@functools.cache
def install() -> None:
    """Once in a process. Raises ValueError for another version of vLLM."""
    if not vllm.__version__.startswith(_KNOWN):
        raise ValueError(
            f"MINIRL_BATCH_INVARIANT is 1 with vLLM {vllm.__version__}: on a CPU it must be {_KNOWN}*, in others what "
            "was replaced may no longer be all that computes"
        )
    RMSNorm.register_oot(layers.TransformersRMSNorm)
    RotaryEmbedding.register_oot(layers.TransformersRotaryEmbedding)
    UnquantizedFusedMoEMethod.register_oot(layers.Experts)
    # on a CPU no other name is looked up
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{__package__}.attention.PagedAttention")
    # No registry reaches these. The activation needs none: vLLM calls torch's silu, which is ours in the mode.
    gemms.dispatch_cpu_unquantized_gemm = layers.set_linear
    _after(CpuPlatform, prepare)


def _after(platform: type, then) -> None:
    """Let `then` see each configuration after the platform did: in the user's own process, before anything starts."""
    check_and_update_config = platform.check_and_update_config.__func__

    def checked(cls, vllm_config) -> None:
        check_and_update_config(cls, vllm_config)
        then(vllm_config)

    platform.check_and_update_config = classmethod(checked)
