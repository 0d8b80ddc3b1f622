"""install: replaces vLLM's kernels on a CPU, through vLLM's registries where it has one."""

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
    """Replace vLLM's kernels, once per process. Raises ValueError for an untested version of vLLM."""
    if not vllm.__version__.startswith(_KNOWN):
        raise ValueError(
            f"MINIRL_BATCH_INVARIANT is 1 with vLLM {vllm.__version__}: on a CPU it must be {_KNOWN}*, since other "
            "versions may compute with kernels that are not replaced"
        )
    RMSNorm.register_oot(layers.TransformersRMSNorm)
    RotaryEmbedding.register_oot(layers.TransformersRotaryEmbedding)
    UnquantizedFusedMoEMethod.register_oot(layers.Experts)
    # on a CPU, vLLM looks up this name only
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{__package__}.attention.PagedAttention")
    # vLLM has no registry for these two. The activation is torch's silu, which the mode covers.
    gemms.dispatch_cpu_unquantized_gemm = layers.set_linear
    _after(CpuPlatform, prepare)


def _after(platform: type, then) -> None:
    """Call `then(config)` after the platform's own check, in the user's process and before the engine starts."""
    check_and_update_config = platform.check_and_update_config.__func__

    def checked(cls, vllm_config) -> None:
        check_and_update_config(cls, vllm_config)
        then(vllm_config)

    platform.check_and_update_config = classmethod(checked)
