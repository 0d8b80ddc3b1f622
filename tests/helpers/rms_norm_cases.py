"""The check of rms_norm's Triton kernels, for the interpreter and a GPU."""

from __future__ import annotations

import torch
from policy_batches import per_row
from triton_cases import compare

from minirl_kernels import rms_norm
from minirl_kernels.ops.rms_norm.reference import rms_norm_reference


def check_rms_norm(x, weight, *, device="cpu"):
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    compare(
        lambda x, weight=None: rms_norm_reference(x, weight, 1e-6),
        lambda x, weight=None, *, backend: rms_norm(x, weight, 1e-6, backend=backend),
        [x] if weight is None else [x, weight],
        upstream,
        lambda exact: [per_row(exact[0]), _first_term(x, weight, upstream), None][: len(exact)],
        device,
    )


def _first_term(x, weight, upstream):
    """The scale of d x: the first of the two terms whose difference it is."""
    wide = x.double()
    return per_row(upstream.double() * (1 if weight is None else weight.double()) / wide.square().mean(-1, True).sqrt())
