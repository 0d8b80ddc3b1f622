"""Finds the scale and the softcap that a model applies to its logits, by running it with artificial logits.

Model families have different names for these settings, so a table of names would miss new families.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from .calls import Call, set_call


class AfterHead(NamedTuple):
    """f(u) = softcap tanh(scale u / softcap) for the head's logits u. softcap=None: f(u) = scale u."""

    scale: float
    softcap: float | None


# From the range where any softcap is linear to the range where it is constant.
_PROBES = (2.0**-30, 0.0, -1.0, 1.0, -10.0, 10.0, 50.0, -300.0, 1e30)


@torch.enable_grad()
def ask_what_follows(called: nn.Module, model: PreTrainedModel, head: nn.Module) -> AfterHead:
    """Measure f. called: the module to call, `model` or the sharded root around it.

    Raises ValueError if the model applies anything but a positive scale and a softcap.
    """
    name, device = type(model).__name__, next(head.parameters()).device
    probes = torch.tensor(_PROBES, dtype=torch.float64, device=device)
    stand_in = probes[None, :, None].expand(1, -1, head.out_features).contiguous()
    outputs = []
    # after FSDP2's hooks on the head and before its hooks on the model, since both may cast
    handles = [
        head.register_forward_hook(lambda module, args, output: stand_in),
        called.register_forward_hook(lambda module, args, output: outputs.append(output), prepend=True),
    ]
    call = Call(head)
    set_call(call)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # the forward may use dropout
            called(torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False, return_dict=True)
    finally:
        set_call(call.outer)
        for handle in handles:
            handle.remove()
    if call.hidden is None:
        raise ValueError("the model's forward does not call its output embeddings: it must, to make logits")
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
            f"{name} does more to its logits after its head than a positive scale and a softcap: it maps "
            f"{list(_PROBES)} to {values[..., 0].flatten().tolist()}, in a row of shape {tuple(values.shape)}"
        )
    return AfterHead(scale, softcap)
