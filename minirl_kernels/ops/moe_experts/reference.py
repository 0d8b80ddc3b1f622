"""Reference of moe_experts, in eager torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def moe_experts_reference(
    hidden: Tensor, weights: Tensor, experts: Tensor, gate_up_proj: Tensor, down_proj: Tensor
) -> Tensor:
    """out[t] = sum_k weights[t, k] down_e (silu(gate) * up), (gate, up) = gate_up_e hidden[t], e = experts[t, k].

    Computed in float32, or in float64 for float64 operands. Two values are rounded to the dtype of hidden: the
    activation and the result. Differentiable. An expert id out of range makes the result of its token NaN.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    out = hidden.new_zeros(hidden.shape, dtype=dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        for expert, (gate_up, down) in enumerate(zip(gate_up_proj, down_proj, strict=True)):
            tokens, ranks = (experts == expert).nonzero(as_tuple=True)
            gate, up = F.linear(hidden[tokens].to(dtype), gate_up.to(dtype)).chunk(2, -1)
            activation = (F.silu(gate) * up).to(hidden.dtype).to(dtype)
            weighted = weights[tokens, ranks, None] * F.linear(activation, down.to(dtype))
            out = out.index_add(0, tokens, weighted.to(dtype))
    out_of_range = ((experts < 0) | (experts >= len(gate_up_proj))).any(-1, keepdim=True)
    return out.masked_fill(out_of_range, torch.nan).to(hidden.dtype)
