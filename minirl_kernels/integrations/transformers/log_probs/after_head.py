"""What a model does to its logits after its head: a scale and a softcap, asked of the model with made-up logits.

A table of the names that families have for them would miss the next one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from .calls import Call, set_call


class AfterHead(NamedTuple):
    """f(u) = softcap tanh(scale u / softcap) of the head's logits u; None: no softcap."""

    scale: float
    softcap: float | None


# From where any softcap is linear to where it is flat; float64, of which float32 keeps all but the ends' last digits.
_PROBES = (2.0**-30, 0.0, -1.0, 1.0, -10.0, 10.0, 50.0, -300.0, 1e30)


@torch.enable_grad()
def ask_what_follows(called: nn.Module, model: PreTrainedModel, head: nn.Module) -> AfterHead:
    """called: what to call, `model` or the sharded root around it. Raises ValueError if f is of another kind."""
    name, device = type(model).__name__, next(head.parameters()).device
    probes = torch.tensor(_PROBES, dtype=torch.float64, device=device)
    stand_in = probes[None, :, None].expand(1, -1, head.out_features).contiguous()
    outputs = []
    # behind the head's hooks of FSDP2 and in front of the model's, either of which may cast
    handles = [
        head.register_forward_hook(lambda module, args, output: stand_in),
        called.register_forward_hook(lambda module, args, output: outputs.append(output), prepend=True),
    ]
    call = Call(head)
    set_call(call)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # there may be dropout on the way
            called(torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False, return_dict=True)
    finally:
        set_call(call.outer)
        for handle in handles:
            handle.remove()
    if call.hidden is None:
        raise ValueError("the model's forward does not call its output embeddings: no logits are made of them")
    (output,) = outputs
    if output.logits.requires_grad:
        raise ValueError(f"{name} scales its logits by a parameter: that must be a number")
    values = output.logits.double()
    scale, softcap = values[0, 0, 0].item() / _PROBES[0], values[0, -1, 0].item()
    scale = 1.0 if abs(scale - 1.0) < 1e-6 else scale
    if softcap > 0.5 * scale * _PROBES[-1]:
        softcap, expected = None, scale * probes
    else:
        expected = softcap * torch.tanh(scale * probes / softcap)
    expected = expected[None, :, None].expand(1, -1, head.out_features)
    if not (scale > 0 and values.shape == expected.shape and torch.allclose(values, expected, rtol=1e-6, atol=0)):
        raise ValueError(
            f"{name} does more to its logits after its head than a positive scale and a softcap: of "
            f"{list(_PROBES)} it makes {values[..., 0].flatten().tolist()} in a row of shape {tuple(values.shape)}"
        )
    return AfterHead(scale, softcap)
