"""mean and sum over rows, over columns (the gradient of a bias) and over everything, beside torch's."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from harness import Contender, Inputs
from torch import Tensor

import minirl_kernels


@dataclass
class MatrixBatch(Inputs):
    x: Tensor  # [T, H]


def matrix_batch(tokens, hidden_size, *, dtype, device) -> MatrixBatch:
    generator = torch.Generator(device).manual_seed(0)
    # positive values, since sums around 0 share no digit in two orders
    return MatrixBatch(torch.rand(tokens, hidden_size, device=device, generator=generator).to(dtype))


def reduced(batch, call, dim):
    return {"out": call(batch.x, dim)}


def contenders(batch, name, dim):
    ours, theirs = getattr(minirl_kernels, name), getattr(torch, name)
    return [
        Contender(name, partial(reduced, batch, ours, dim), kind="ours"),
        Contender(f"torch.{name}", partial(reduced, batch, theirs, dim)),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("what", "name", "dim", "tokens", "hidden_size"),
    [
        ("mean of each row", "mean", -1, 4096, 2048),
        ("mean of each short row", "mean", -1, 65_536, 128),
        ("mean of one long row", "mean", -1, 1, 151_936),
        ("sum of each column", "sum", 0, 4096, 2048),
        ("sum of everything", "sum", None, 4096, 2048),
    ],
    ids=["rows", "short", "long", "columns", "all"],
)
def test_mean(compare, device, dtype, what, name, dim, tokens, hidden_size):
    compare(
        what,
        make=partial(matrix_batch, dtype=dtype, device=device),
        contenders=partial(contenders, name=name, dim=dim),
        shape={"tokens": tokens, "hidden_size": hidden_size},
        small={"tokens": 12, "hidden_size": 515},
        dtype=dtype,
        floor_bytes=lambda batch: batch.x.nbytes,
    )
