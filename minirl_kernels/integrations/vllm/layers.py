"""Layers for vLLM's Qwen3 and Qwen3-MoE that run the same operations as transformers, with the same rounding.

They call moe_experts and torch, whose operations the batch-invariant mode replaces. Weights are used as loaded, without
packing, so reloaded weights take effect at once.
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
    """Replacement for dispatch_cpu_unquantized_gemm: sets layer.cpu_linear(x, weight, bias), and keeps the weight."""
    layer.cpu_linear = float32_linear if isinstance(layer, ParallelLMHead) else F.linear


class TransformersRMSNorm(RMSNorm):
    """RMSNorm with transformers' rounding: after the residual sum, and before the product with the weight."""

    def forward_native(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """x, residual: [..., H]. Returns norm(x), or (norm(x + residual), x + residual)."""
        if residual is not None:
            x = residual + x
        floats = x.float()
        floats = floats * torch.rsqrt(floats.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        out = self.weight * floats.to(x.dtype)
        return out if residual is None else (out, x)


class TransformersRotaryEmbedding(RotaryEmbedding):
    """Rotary embedding that rounds each product and then the sum, as transformers does."""

    def forward_native(self, positions: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """positions [T]; query, key [T, heads D]."""
        cos, sin = self.cos_sin_cache[positions][:, None].chunk(2, -1)
        return self._rotated(query, cos, sin), self._rotated(key, cos, sin)

    forward_cpu = forward_native

    def _rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.view(len(x), -1, self.head_size).chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).view(x.shape)


def softmax_topk(router_logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """(weights [T, K] in the dtype of router_logits [T, E], expert ids [T, K] int32), in descending order."""
    weights, ids = F.softmax(router_logits, dim=-1, dtype=torch.float32).topk(top_k, -1)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights.to(router_logits.dtype), ids.int()


def recorded_topk(router_logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """As softmax_topk, by moe_routing: the training engine computes so while it records or replays experts."""
    routing = moe_routing(router_logits, top_k, norm_topk_prob=renormalize)
    return routing.weights.to(router_logits.dtype), routing.experts.int()


class Experts(UnquantizedFusedMoEMethod):
    """moe_experts with w13_weight [E, 2 I, H] and w2_weight [E, H, I] as loaded."""

    def __init__(self, moe):
        # skips the parent's __init__, which picks kernels that require certain sizes
        super(UnquantizedFusedMoEMethod, self).__init__(moe)
        self.unquantized_backend = UnquantizedMoeBackend.OOT

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        pass

    def apply(
        self, layer: nn.Module, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, shared_experts, shared_experts_input
    ) -> Tensor:
        return moe_experts(x, (topk_weights, topk_ids), layer.w13_weight, layer.w2_weight).to(x.dtype)
