"""Whether a model keeps packed sequences apart: attention is told of them, a convolution or a recurrence is not.

No list of names decides: the model is asked once, with two short sequences in one row. Where the gradient of the second
one's outputs by the embeddings of the first one is not exactly 0, something went from one into the other.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ...common.library import register
from .traces import Trace, in_words, over_tokens, traced

_LENGTHS = (6, 7)
_KNOWN = "_minirl_packing"
# kinds of layers, in the words of transformers' configs, that leave it to the mask where a sequence begins
_APART = {"full_attention", "sliding_attention", "chunked_attention", "indexed_attention", "mlp", "moe"}


def refuse_packed(
    model: PreTrainedModel, position_ids: Tensor | None, cu_seq_lens: Tensor | None = None
) -> Tensor | None:
    """Raises ValueError that names the module where the input is packed and `model` would let sequences mix.

    position_ids: [B, L], which pack where they go down; cu_seq_lens: those of flash attention, which always pack.
    Returns position_ids, to be used from there on: torch.compile drops a check whose result nobody uses.
    The model is asked in the first call, and once for each attention implementation: `packing_leak` says how.
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
    """Raises ValueError where a config says that some layers are no attention over sequences.

    For an attention that is given packed sequences, and sees nothing of the model but its config.
    """
    others = sorted(set(getattr(config, "layer_types", None) or ()) - _APART)
    if others:
        raise ValueError(_message(f"{type(config).__name__} has layers of the kind {', '.join(others)}, which"))


def packing_leak(model: PreTrainedModel) -> str | None:
    """The first module that lets a packed sequence change the one behind it, such as "layers.0.mixer (Mixer)"; or None.

    model: a causal language model of transformers with its weights, on any device; it runs forward and backward on 13
        tokens, with no gradient of its weights. The answer is kept on it.
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
    """Drop the answer that `packing_leak` has left on a model."""
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
        f"{reason} lets a sequence change the one behind it"
    )


def _check(position_ids: Tensor, reason: str) -> Tensor:
    if position_ids.dim() == 2 and bool((position_ids[:, 1:] < position_ids[:, :-1]).any()):
        raise ValueError(_message(reason))
    return position_ids.clone()


# an op, so that torch.compile need not trace its branch
_refuse_restarts = register(
    "refuse_restarts(Tensor position_ids, str reason) -> Tensor",
    _check,
    lambda position_ids, _: torch.empty_like(position_ids),
    waits=True,
)
