"""Attention over vLLM's paged cache by attention_over_spans.

The cache is [blocks, tokens of a block, heads, keys and values beside each other]. In each forward the tokens of all
sequences are gathered from their blocks, one sequence after the other, and attended to where they then lie.
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
    """What vLLM asks of a backend."""

    @staticmethod
    def get_name() -> str:
        return "CPU_ATTN"  # the name that it takes the place of

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl]:
        return PagedAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder]:
        return StepBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # the tokens of a head are then equally far apart, within a block and from one to the next
        return (KVCacheLayout.LBNHC,)


@dataclass
class Step:
    """What all layers of a forward share: T tokens of N sequences, which have S keys by now."""

    num_tokens: int
    written: Tensor
    """[T] int64: where in the cache each token goes, as block times block size plus place in it."""
    read: Tensor
    """[S] int64: where the keys of the first sequence are, then those of the next."""
    spans: Tensor
    """[N, 5] int64, of attention_over_spans."""


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
        """Raises ValueError for what it does not compute; TypeError for the arguments of other models."""
        asked = {
            "alibi_slopes": alibi_slopes,
            "sliding_window": sliding_window,
            "logits_soft_cap": logits_soft_cap,
            "attn_type": None if attn_type == AttentionType.DECODER else attn_type,
            "kv_sharing_target_layer_name": kv_sharing_target_layer_name,
        }
        for name, value in asked.items():
            if value is not None:
                raise ValueError(
                    f"MINIRL_BATCH_INVARIANT is 1, and {name} of an attention is {value!r}: it must be none"
                )
        self.num_heads, self.num_kv_heads, self.head_size = num_heads, num_kv_heads, head_size
        self.scale, self.kv_cache_dtype = scale, kv_cache_dtype

    def forward(
        self, layer, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, attn_metadata: Step | None,
        output: Tensor, output_scale: Tensor | None = None, output_block_scale: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """query [T, Hq, D], key and value [T, Hkv, D], kv_cache [blocks, Hkv, block size, 2 D]; output [T, Hq, D]."""
        if attn_metadata is None:  # a run for vLLM to see how much memory it takes
            return output.zero_()
        step, tokens = attn_metadata, slice(attn_metadata.num_tokens)
        cache = kv_cache.transpose(1, 2).flatten(0, 1)
        cache.index_copy_(0, step.written, torch.cat([key[tokens], value[tokens]], -1).to(cache.dtype))
        keys, values = cache.index_select(0, step.read).transpose(0, 1)[None].chunk(2, -1)
        queries = query[tokens].transpose(0, 1)[None]
        output[tokens] = attention_over_spans(queries, keys, values, step.spans, scale=self.scale)[0]
        return output
