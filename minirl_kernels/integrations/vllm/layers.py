"""The layers of vLLM's Qwen3 and Qwen3-MoE by the operations that transformers runs, with the same roundings.

They call torch, whose operations are ours in batch-invariant mode, and moe_experts. Products are of the weights as they
were loaded: nothing is packed, so that whatever loads weights again is seen.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from ...ops.matmul.op import float32_linear
from ...ops.moe_experts import moe_experts
from ...ops.moe_routing import moe_routing


def set_linear(layer: nn.Module, remove_weight: bool) -> None:
    """dispatch_cpu_unquantized_gemm: what `layer` calls as cpu_linear(x, weight, bias). The weight always stays."""
    layer.cpu_linear = float32_linear if isinstance(layer, ParallelLMHead) else F.linear


class TransformersRMSNorm(RMSNorm):
    """The sum with the residual is rounded before it is normed, and the normed before its product with the weight."""

    def forward_native(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """x [..., H], residual [..., H]: the norm of x, or (the norm of their sum, the sum)."""
        if residual is not None:
            x = residual + x
        floats = x.float()
        floats = floats * torch.rsqrt(floats.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        out = self.weight * floats.to(x.dtype)
        return out if residual is None else (out, x)


class TransformersRotaryEmbedding(RotaryEmbedding):
    """Each product is rounded, then the sum."""

    def forward_native(self, positions: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """positions [T]; query, key [T, heads D]."""
        cos, sin = self.cos_sin_cache[positions][:, None].chunk(2, -1)
        return self._rotated(query, cos, sin), self._rotated(key, cos, sin)

    forward_cpu = forward_native

    def _rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.view(len(x), -1, self.head_size).chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).view(x.shape)


def softmax_topk(router_logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """Weights [T, K], of the dtype of router_logits [T, E], and ids of experts [T, K] int32, the likeliest first."""
    weights, ids = F.softmax(router_logits, dim=-1, dtype=torch.float32).topk(top_k, -1)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights.to(router_logits.dtype), ids.int()


def recorded_topk(router_logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """The same by moe_routing, as training computes it while it records or replays."""
    routing = moe_routing(router_logits, top_k, norm_topk_prob=renormalize)
    return routing.weights.to(router_logits.dtype), routing.experts.int()


class Experts(UnquantizedFusedMoEMethod):
    """moe_experts, on w13_weight [E, 2 I, H] and w2_weight [E, H, I] as they were loaded."""

    def __init__(self, moe):
        # not its own, which picks kernels that have demands on the sizes
        super(UnquantizedFusedMoEMethod, self).__init__(moe)
        self.unquantized_backend = UnquantizedMoeBackend.OOT

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        pass

    def apply(
        self, layer: nn.Module, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, shared_experts, shared_experts_input
    ) -> Tensor:
        return moe_experts(x, (topk_weights, topk_ids), layer.w13_weight, layer.w2_weight).to(x.dtype)
