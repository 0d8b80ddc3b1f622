"""Finds out whether a model keeps packed sequences apart. Attention can; convolutions and recurrences often do not.

There is no list of models: each model is tested once, with two short sequences packed in one row. The sequences mix if
the gradient of the second sequence's logits by the first sequence's embeddings is not exactly 0.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ...common.library import register_check
from .traces import Trace, in_words, over_tokens, traced

_LENGTHS = (6, 7)
_KNOWN = "_minirl_packing"
# Layer kinds (`layer_types` of a config) that separate packed sequences if the attention mask does.
_APART = {"full_attention", "sliding_attention", "chunked_attention", "indexed_attention", "mlp", "moe"}


def refuse_packed(
    model: PreTrainedModel, position_ids: Tensor | None, cu_seq_lens: Tensor | None = None
) -> Tensor | None:
    """Raises ValueError if the input is packed and `model` would let sequences mix; the message names the module.

    position_ids: [B, L]; a decreasing value means that the row is packed. cu_seq_lens: offsets of flash attention,
        which always mean packed input.
    Returns position_ids. The caller must use the result, since torch.compile drops a check whose result is unused.
    The model is tested in the first call, and once per attention implementation; see `packing_leak`.
    """
    if position_ids is None and cu_seq_lens is None:
        return None
    known = model.__dict__.get(_KNOWN, {})
    implementation = model.config._attn_implementation
    reason = known[implementation] if implementation in known else packing_leak(model)
    if reason is None:
        return position_ids
    if cu_seq_lens is not None:
        raise ValueError(_message(reason))
    return _refuse_restarts(position_ids, reason)


def refuse_packed_kinds(config: PreTrainedConfig | None) -> None:
    """Raises ValueError if the config has kinds of layers that do not separate packed sequences.

    For an attention function that gets packed sequences and knows the model's config, but not the model.
    """
    others = sorted(set(getattr(config, "layer_types", None) or ()) - _APART)
    if others:
        raise ValueError(_message(f"{type(config).__name__} has layers of the kind {', '.join(others)}, which"))


def packing_leak(model: PreTrainedModel) -> str | None:
    """The first module that lets a packed sequence change the next one, such as "layers.0.mixer (Mixer)"; or None.

    model: a causal language model of transformers with its weights, on any device. It runs forward and backward on 13
        tokens, without gradients of its weights. The result is stored on the model.
    Raises ValueError for weights on the meta device.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            f"the weights of {type(model).__name__} are on the meta device: packed input can be checked after loading"
        )
    reason = _leak(model)
    model.__dict__.setdefault(_KNOWN, {})[model.config._attn_implementation] = reason
    return reason


def forget_packing(model: nn.Module) -> None:
    """Delete the result that `packing_leak` stored on a model."""
    model.__dict__.pop(_KNOWN, None)


@torch.inference_mode(False)
@torch.enable_grad()
def _leak(model: PreTrainedModel) -> str | None:
    table = model.get_input_embeddings()
    device = table.weight.device
    ids = torch.arange(sum(_LENGTHS), device=device)[None] % table.num_embeddings
    positions = torch.cat([torch.arange(count, device=device) for count in _LENGTHS])[None]
    leaves = []

    def as_leaf(module, args, output):
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    handle = table.register_forward_hook(as_leaf)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), traced(model) as trace:
            logits = model(ids, position_ids=positions, use_cache=False, return_dict=True).logits
    finally:
        handle.remove()
    return _first(model, trace, leaves) if _reaches(logits, leaves) else None


def _reaches(values: Tensor, leaves: list[Tensor]) -> bool:
    """Whether the second sequence of `values` depends on the first sequence of the embeddings `leaves`."""
    second = values[:, _LENGTHS[0] :].float()
    if not second.requires_grad:
        return False
    weights = torch.linspace(0.5, 1.5, second.numel(), device=second.device).view_as(second)
    gradients = torch.autograd.grad((second * weights).sum(), leaves, retain_graph=True, allow_unused=True)
    return any(bool((gradient[:, : _LENGTHS[0]] != 0).any()) for gradient in gradients if gradient is not None)


def _first(model: nn.Module, trace: Trace, leaves: list[Tensor]) -> str:
    for name, (inputs, outputs) in trace.calls.items():
        before, after = (over_tokens(parts, 1, sum(_LENGTHS)) for parts in (inputs, outputs))
        if before is not None and after is not None and _reaches(after, leaves) and not _reaches(before, leaves):
            return in_words(model, name)
    return type(model).__name__


def _message(reason: str) -> str:
    return (
        f"the input is packed (position_ids that restart, or cu_seq_lens): it must be one sequence per row, padded, as "
        f"{reason} lets a sequence change the next one"
    )


def _check(position_ids: Tensor, reason: str) -> None:
    if position_ids.dim() == 2 and bool((position_ids[:, 1:] < position_ids[:, :-1]).any()):
        raise ValueError(_message(reason))


_refuse_restarts = register_check("refuse_restarts(Tensor position_ids, str reason) -> Tensor", _check)
