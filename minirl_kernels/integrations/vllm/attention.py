"""Attention over vLLM's paged cache by attention_over_spans.

The cache is [blocks, tokens of a block, heads, keys and then values]. Each forward gathers the keys and values of all
sequences from their blocks into one tensor, one sequence after the other. The attention then reads this tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from ...ops.attention import attention_over_spans


class PagedAttention(AttentionBackend):
    """The attention backend that vLLM loads."""

    @staticmethod
    def get_name() -> str:
        return "CPU_ATTN"  # replaces vLLM's backend of this name

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl]:
        return PagedAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder]:
        return StepBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # the tokens of a head then have one stride, within a block and across blocks
        return (KVCacheLayout.LBNHC,)


@dataclass
class Step:
    """The inputs that all layers of a forward share: T new tokens of N sequences with S keys in all."""

    num_tokens: int
    written: Tensor
    """[T] int64: cache slot of each new token, block * block size + place in the block."""
    read: Tensor
    """[S] int64: cache slots of all keys, one sequence after the other."""
    spans: Tensor
    """[N, 5] int64, for attention_over_spans."""


class StepBuilder(AttentionMetadataBuilder[Step]):
    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._block_size = kv_cache_spec.block_size

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Step:
        common, count = common_attn_metadata, common_attn_metadata.num_reqs
        starts, keys = common.query_start_loc[: count + 1].long(), common.seq_lens[:count].long()
        first_key = keys.cumsum(0) - keys
        sequence = torch.repeat_interleave(keys)
        place = torch.arange(len(sequence)) - first_key[sequence]
        block = common.block_table_tensor[sequence, place // self._block_size]
        return Step(
            num_tokens=common.num_actual_tokens,
            written=common.slot_mapping[: common.num_actual_tokens].long(),
            read=block * self._block_size + place % self._block_size,
            spans=torch.stack([torch.zeros_like(keys), starts[:-1], starts.diff(), first_key, keys], 1),
        )


class PagedAttentionImpl(AttentionImpl[Step]):
    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None,
        attn_type: str,
        kv_sharing_target_layer_name: str | None,
    ):
        """Raises ValueError for an unsupported setting, TypeError for an unknown argument."""
        unsupported = {
            "alibi_slopes": alibi_slopes,
            "sliding_window": sliding_window,
            "logits_soft_cap": logits_soft_cap,
            "attn_type": None if attn_type == AttentionType.DECODER else attn_type,
            "kv_sharing_target_layer_name": kv_sharing_target_layer_name,
        }
        for name, value in unsupported.items():
            if value is not None:
                raise ValueError(
                    f"MINIRL_BATCH_INVARIANT is 1, and {name} of an attention is {value!r}: it must be None"
                )
        self.num_heads, self.num_kv_heads, self.head_size = num_heads, num_kv_heads, head_size
        self.scale, self.kv_cache_dtype = scale, kv_cache_dtype

    def forward(
        self, layer, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, attn_metadata: Step | None,
        output: Tensor, output_scale: Tensor | None = None, output_block_scale: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """query [T, Hq, D], key and value [T, Hkv, D], kv_cache [blocks, Hkv, block size, 2 D]; output [T, Hq, D]."""
        if attn_metadata is None:  # vLLM's run to measure memory
            return output.zero_()
        step, tokens = attn_metadata, slice(attn_metadata.num_tokens)
        cache = kv_cache.transpose(1, 2).flatten(0, 1)
        cache.index_copy_(0, step.written, torch.cat([key[tokens], value[tokens]], -1).to(cache.dtype))
        keys, values = cache.index_select(0, step.read).transpose(0, 1)[None].chunk(2, -1)
        queries = query[tokens].transpose(0, 1)[None]
        output[tokens] = attention_over_spans(queries, keys, values, step.spans, scale=self.scale)[0]
        return output
