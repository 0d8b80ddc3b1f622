"""`attn_implementation="minirl"`: computes the attention of causal models of transformers by attention_over_spans.

transformers calls an implementation twice. First, once per forward, it asks for a mask; it passes a padding mask and a
mask function of indices. Then every layer passes this mask to the attention function.

Here the mask is the spans of attention_over_spans: the positions of the queries and keys of each sequence. A block of
keys begins at the first token of a sequence, after its padding. So a token has the same bits in every layout. The spans
have the shape [1, 1, N, 5], since transformers passes a mask of four dimensions through unchanged.

The mask function is evaluated for four keys per token: the next token, the previous token, the first token of the
sequence, and the last token of the previous sequence. This finds the sequences that position_ids pack. It also finds a
window that is shorter than a sequence. The layer with this window raises the error, since transformers also makes masks
that no layer uses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function

from ...common.library import register, register_check
from ...ops.attention import attention, attention_over_spans
from .packing import refuse_packed_kinds

# {keyword: the unsupported feature that it requests}
_REFUSED = {
    "softcap": "a softcap of the scores",
    "s_aux": "attention sinks",
    "position_bias": "a bias of the scores",
    "head_mask": "a mask of heads",
    "cache": "a paged cache",
}

_NOT_CAUSAL = "a token does not see exactly the tokens before it in its sequence (a window, a chunk, an image)"


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """attention_over_spans for an attention module of transformers, with the signature of attention implementations.

    query: [B, Hq, L, D]; key, value: [B, Hkv, S, ...]; as in attention_over_spans.
    attention_mask: the result of the function attention_mask below; None if there is no padding and S = L.
    cu_seq_lens_q, cu_seq_lens_k: offsets of packed sequences in a batch of one, as for flash attention. If given, they
        take the place of attention_mask.
    Returns ([B, L, Hq, Dv], None). A padding query gives 0.
    Raises ValueError that names a feature of the module that this attention does not support.
    """
    if attention_mask is not None and attention_mask.dtype == torch.int64 and attention_mask.shape[-1] == 0:
        _refuse(_NOT_CAUSAL)
    unsupported = [feature for name, feature in _REFUSED.items() if kwargs.get(name) is not None]
    if dropout:
        unsupported.append(f"dropout, of {dropout}")
    if kwargs.get("output_attentions"):
        unsupported.append("the attention weights (output_attentions)")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        unsupported.append("attention that is not causal")
    if unsupported:
        _refuse(f"{type(module).__name__} asks for {', '.join(unsupported)}")
    is_checked = sliding_window is not None and key.shape[2] > sliding_window
    if kwargs.get("cu_seq_lens_q") is not None:
        refuse_packed_kinds(getattr(module, "config", None))
        if query.shape[0] != 1:
            _refuse(f"cu_seq_lens_q is given with a batch of {query.shape[0]} rather than of 1")
        offsets = {"cu_seqlens_q": kwargs["cu_seq_lens_q"], "cu_seqlens_k": kwargs["cu_seq_lens_k"]}
        if is_checked:
            offsets["cu_seqlens_k"] = _within_window(offsets["cu_seqlens_k"], sliding_window)
        return attention(*(x.squeeze(0).transpose(0, 1) for x in (query, key, value)), **offsets, scale=scaling)[
            None
        ], None
    spans = _spans_from_mask(attention_mask, query, key)
    if is_checked:
        spans = _within_window(spans, sliding_window)
    return attention_over_spans(query, key, value, spans, scale=scaling), None


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs,
) -> Tensor:
    """The spans of a forward, with the signature of mask functions in transformers.

    attention_mask: [B, columns so far], True for tokens. The tokens of a row must be contiguous.
    Returns int64 [1, 1, N, 5]. If a token does not see exactly the tokens before it, returns an empty tensor, which
    attention_forward refuses. Raises ValueError that names any other unsupported mask.
    """
    if kv_offset:
        _refuse("a cache has dropped the keys before a sliding window")
    if use_vmap:
        _refuse("the model has a mask function of its own (or_mask_function, and_mask_function)")
    device = torch.device(device)
    if isinstance(q_offset, Tensor) and q_offset.device.type == "cpu" and not torch.compiler.is_compiling():
        q_offset = int(q_offset)
    is_causal = mask_function is causal_mask_function
    if is_causal and isinstance(q_offset, int) and _is_whole(attention_mask, q_offset + q_length):
        return _whole_batch(batch_size, q_length, q_offset, device)
    first, end = _tokens(attention_mask, batch_size, q_offset + q_length, device)
    if is_causal:
        batch = torch.arange(batch_size, device=device)
        queries_from = (first - q_offset).clamp(0, q_length)
        queries = (end - q_offset - queries_from).clamp(min=0)
        spans = torch.stack([batch, queries_from, queries, first, (end - first).clamp(min=0)], 1)
    else:
        spans = _sequences(mask_function, first, end, q_offset, q_length)
        if len(spans) > batch_size and not torch.compiler.is_compiling():
            refuse_packed_kinds(kwargs.get("config"))
    return spans[None, None]


def _refuse(reason: str):
    raise ValueError(_message(reason))


def _message(reason: str) -> str:
    return f"attn_implementation is 'minirl': it must be another where {reason}"


def _spans_from_mask(mask, query, key) -> Tensor:
    if mask is None:
        if query.shape[2] != key.shape[2]:
            _refuse(f"attention_mask is None with {query.shape[2]} queries and {key.shape[2]} keys")
        return _whole_batch(query.shape[0], query.shape[2], 0, query.device)[0, 0]
    if mask.dtype != torch.int64 or mask.dim() != 4 or mask.shape[3] != 5:
        _refuse(
            f"attention_mask is a mask of your own, {mask.dtype} {tuple(mask.shape)}, rather than a padding mask [B, L]"
        )
    return mask[0, 0]


def _is_whole(mask: Tensor | None, seen: int) -> bool:
    """Whether the mask has no padding. False for a mask on a GPU, since reading it would block the host."""
    if mask is None or torch.compiler.is_compiling() or mask.device.type != "cpu":
        return mask is None
    return mask.shape[1] >= seen and bool(mask.all())


def _whole_batch(batch_size: int, q_length: int, q_offset: int, device: torch.device) -> Tensor:
    """The spans of a batch without padding. All layers and forwards of these sizes share them."""
    # A CUDA graph may outlive an entry of the cache, and the tensor of a graph has no values before a replay.
    is_capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return (_new_whole_batch if is_capturing else _cached_whole_batch)(batch_size, q_length, q_offset, device)


def _new_whole_batch(batch_size: int, q_length: int, q_offset: int, device: torch.device) -> Tensor:
    # A tensor made in inference mode cannot be saved for a later backward.
    with torch.inference_mode(False):
        spans = torch.zeros(batch_size, 5, dtype=torch.int64, device=device)
        spans[:, 0] = torch.arange(batch_size, device=device)
        spans[:, 2] = q_length
        spans[:, 4] = q_offset + q_length
        return spans[None, None]


_cached_whole_batch = functools.lru_cache(maxsize=64)(_new_whole_batch)


def _tokens(mask: Tensor | None, batch_size: int, seen: int | Tensor, device) -> tuple[Tensor, Tensor]:
    """(first column, end column) of the tokens of each batch entry, among the columns so far."""
    if mask is None:
        first = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return first, first + seen
    mask = mask.bool()
    runs = mask[:, 0] + (mask[:, 1:] & ~mask[:, :-1]).sum(1)
    first = mask.int().argmax(1)
    end = first + mask.sum(1)
    return _checked(runs <= 1, first, "attention_mask has padding between the tokens of a row"), end.clamp(max=seen)


def _sequences(mask_function, first: Tensor, end: Tensor, q_offset, q_length: int) -> Tensor:
    """The spans of the sequences that the mask function separates; an empty tensor for an unsupported mask."""
    batch_size, device = len(first), first.device
    batch = torch.arange(batch_size, device=device)[:, None].expand(-1, q_length)
    column = (torch.arange(q_length, device=device) + q_offset).expand(batch_size, -1)
    is_token = (column >= first[:, None]) & (column < end[:, None])

    def sees(keys, where):
        """Whether each query sees its key. Where `where` is False, the query itself is the key."""
        seen = mask_function(batch, torch.zeros_like(batch), column, keys.where(where, column))
        return seen.expand(batch_size, q_length)

    has_next = is_token & (column + 1 < end[:, None]) & (torch.arange(q_length, device=device) + 1 < q_length)
    has_previous = is_token & (column > first[:, None])
    begins = is_token & ~(has_previous & sees(column - 1, has_previous))
    begin = torch.where(begins, column, first[:, None]).cummax(1).values
    good = ~has_next | ~sees(column + 1, has_next)
    good &= ~is_token | sees(begin, is_token)
    has_other = is_token & (begin > first[:, None])
    good &= ~has_other | ~sees(begin - 1, has_other)
    if torch.compiler.is_compiling():
        begin = _checked(good.flatten(), begin, _NOT_CAUSAL)
    elif not bool(good.all()):
        return good.new_empty(0, 0, dtype=torch.int64)
    # A span begins at the start of a sequence, or at the first token of it in this forward.
    place = torch.arange(q_length, device=device).expand(batch_size, -1)
    starts = is_token & (begins | (place == 0) | ~is_token.roll(1, 1))
    after = torch.where(starts, place, q_length).flip(1).cummin(1).values.flip(1).roll(-1, 1)
    after[:, -1] = q_length
    last = torch.minimum(after, (end - q_offset)[:, None])
    spans = torch.stack([batch, place, last - place, begin, last + q_offset - begin], -1)
    if torch.compiler.is_compiling():  # a fixed number of spans, of which some are empty, keeps shapes static
        end, none = last.clamp(min=0), torch.zeros_like(last)
        empty = torch.stack([batch, end, none, end + q_offset, none], -1)  # where the sequence ends: spans are in order
        return torch.where(starts[..., None], spans, empty).flatten(0, 1)
    return spans[starts]


def _check(good: Tensor, values: Tensor, reason: str) -> Tensor:
    if good.device.type != "cpu":  # an assertion on the device, because the host would wait
        torch._assert_async(good.all(), _message(reason))
    elif not bool(good.all()):
        _refuse(reason)
    return values.clone()


def _check_window(spans: Tensor, sliding_window: int) -> None:
    """spans: [N, 5], or the offsets of packed keys [N + 1]."""
    keys = spans.diff() if spans.dim() == 1 else spans[:, 4]
    longest = int(keys.max()) if len(keys) else 0
    if longest > sliding_window:
        _refuse(f"a sliding window, of {sliding_window}, is shorter than a sequence, of {longest}")


# An op that returns a copy, for the reasons that register_check gives. It checks another tensor than it copies.
_checked = register(
    "checked_mask(Tensor good, Tensor values, str what) -> Tensor",
    _check,
    lambda good, values, what: torch.empty_like(values),
)
_within_window = register_check("checked_window(Tensor spans, SymInt sliding_window) -> Tensor", _check_window)
