"""The head of a model: the supported kinds, and the head's product as a single matrix product, also with adapters.

A LoRA head is a wider matrix: with hidden states h and adapters of scale s, logits = [h, h A^T] [W, s B]^T + bias.
W + s B A is never formed, since rounding it to 16 bits would lose small updates.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from ....batch_invariant import is_batch_invariant
from ....ops.matmul.op import float32_linear
from .calls import current_call


def take_head(head: nn.Module, model_name: str) -> None:
    """Replace the head's forward by _head_forward.

    Raises TypeError for an unknown kind of head, ValueError for weights on the meta device.
    """
    check_head(head, model_name)
    if "forward" in vars(head):
        raise TypeError(
            f"the forward of the output embeddings of {model_name}, a {type(head).__name__}, was replaced before: it "
            "must be the class's own"
        )
    if any(weight.is_meta for weight in head.parameters()):
        raise ValueError(
            f"the weights of {model_name} are on the meta device: enable_log_probs must come after loading them"
        )
    head.forward = functools.partial(_head_forward, head)  # a partial can be pickled; methods and closures cannot


def is_taken(head: nn.Module) -> bool:
    forward = vars(head).get("forward")
    return isinstance(forward, functools.partial) and forward.func is _head_forward


def leave_head(head: nn.Module) -> None:
    if is_taken(head):
        del head.forward


def check_head(head: nn.Module, model_name: str) -> None:
    """Raises TypeError for a kind of head that linear_of does not support; the message names it."""
    try:
        for linear in [head.original_module, *head.modules_to_save.values()] if _is_saved(head) else [head]:
            _check_linear(linear.base_layer if _is_lora(linear) else linear)
            if _is_lora(linear):
                _check_variants(linear, linear.lora_A)
    except TypeError as error:
        raise TypeError(
            f"the output embeddings of {model_name} are a {type(head).__name__}: they must be an nn.Linear with its "
            f"own forward, or LoRA or modules_to_save of PEFT around one ({error})"
        ) from None


def linear_of(head: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """(hidden, weight, bias) of the product that the head computes now, with its active adapters; hidden: [..., H]."""
    if _is_saved(head):
        is_original = head.disable_adapters or not head.active_adapters
        is_original = is_original or head.active_adapters[0] not in head.modules_to_save
        return linear_of(head.original_module if is_original else head.modules_to_save[head.active_adapters[0]], hidden)
    if not _is_lora(head):
        return hidden, head.weight, head.bias
    if head.disable_adapters and head.merged:
        head.unmerge()  # as its own forward does
    base = head.base_layer
    if head.disable_adapters or head.merged:
        return hidden, base.weight, base.bias
    active = [name for name in head.active_adapters if name in head.lora_A]
    _check_variants(head, active)
    hidden_dtype, weight_dtype = hidden.dtype, base.weight.dtype
    if torch.is_autocast_enabled(hidden.device.type):  # cast before joining, to avoid a wider copy
        hidden_dtype = weight_dtype = torch.get_autocast_dtype(hidden.device.type)
    hiddens, weights, bias = [hidden.to(hidden_dtype)], [base.weight.to(weight_dtype)], base.bias
    for name in active:
        lora_a, lora_b, scale = head.lora_A[name], head.lora_B[name], head.scaling[name]
        hiddens.append(lora_a(head.lora_dropout[name](hidden.to(lora_a.weight.dtype))).to(hidden_dtype))
        weights.append((lora_b.weight.float() * scale).to(weight_dtype))
        if lora_b.bias is not None:
            added = lora_b.bias.float() * scale
            bias = added if bias is None else bias.float() + added
    return torch.cat(hiddens, -1), torch.cat(weights, -1), bias


def gives_float32() -> bool:
    """Whether a head returns float32 logits: in the mode, without gradients. The mode runs nothing compiled."""
    return not (torch.compiler.is_compiling() or torch.is_grad_enabled()) and is_batch_invariant()


def _head_forward(head: nn.Module, input: Tensor, *args, **kwargs) -> Tensor:
    call = current_call()
    given = [name for name, value in kwargs.items() if value is not None]
    if call is not None and call.head is head:
        if given:
            raise ValueError(f"{given[0]} is given with token_ids: it must be None, all rows have one head")
        return call.keep(input)
    if not given and gives_float32():
        # so that tokens are sampled from the same numbers as the log-probabilities of training
        return float32_linear(*linear_of(head, input))
    return type(head).forward(head, input, *args, **kwargs)


def _is_saved(head: nn.Module) -> bool:
    return type(head).__name__ == "ModulesToSaveWrapper" and type(head).__module__.startswith("peft.")


def _is_lora(head: nn.Module) -> bool:
    return type(head).__name__ == "Linear" and type(head).__module__.startswith("peft.tuners.lora.")


def _check_linear(linear: nn.Module) -> None:
    replaced = "forward" in vars(linear) and not is_taken(linear)
    if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward or replaced:
        raise TypeError(f"this has a {type(linear).__name__}: merge or leave out its adapters, and do not quantise it")


def _check_variants(head: nn.Module, adapters) -> None:
    for name in adapters:
        if name in head.lora_variant:
            raise TypeError(f"the adapter {name} is a {type(head.lora_variant[name]).__name__}: it must be plain LoRA")
