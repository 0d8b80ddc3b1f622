"""Random heads of a vocabulary, and the eager path through logits, for the tests of the linear losses."""

from __future__ import annotations

import torch
from policy_batches import SLACK

TINY_TEMPERATURE = 2.0**-17


def random_head(tokens, hidden_size, vocab_size, dtype=torch.float32, seed=0, with_bias=False):
    """(hidden [T, H], weight [V, H], token_ids [T], bias [V] or None); the logits have a standard deviation near 2."""
    gen = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, hidden_size, generator=gen).to(dtype)
    weight = (2 * torch.randn(vocab_size, hidden_size, generator=gen) / hidden_size**0.5).to(dtype)
    bias = torch.randn(vocab_size, generator=gen).to(dtype) if with_bias else None
    return hidden, weight, torch.randint(vocab_size, (tokens,), generator=gen), bias


def cancelling_head(tokens, hidden_size, vocab_size, dtype):
    """A head [w, -w] and hidden states [x, x]: the exact logits are 0.

    At TINY_TEMPERATURE the results show any other order of a sum.
    """
    hidden, weight, token_ids, _ = random_head(tokens, hidden_size, vocab_size, dtype)
    return torch.cat([hidden, hidden], 1), torch.cat([weight, -weight], 1), token_ids


def assert_matrices_as_exact(actual, eager, exact):
    """The error of `actual` against float64 is at most the error of the eager path in the same dtype, plus SLACK.

    Errors are 2-norms over the whole matrix, because the error of a single element is random and the orders of
    summation differ. The last rounding still makes a random difference: 1/64 of the dtype's eps for a matrix, and more
    where a few large elements have nearly all of the norm, such as a bias that few tokens touch.
    """
    assert actual.dtype == eager.dtype
    assert actual.shape == exact.shape == eager.shape
    if exact.numel():
        exact = exact.double()
        scale = exact.norm().where(exact.any(), 1.0)
        ours, theirs, rounded = ((x.double() - exact).norm() / scale for x in (actual, eager, exact.to(actual.dtype)))
        # the norm of the errors of n like elements has a standard deviation of about half of itself / sqrt(n)
        elements = scale**4 / (exact**4).sum().where(exact.any(), 1.0)
        random = max(torch.finfo(actual.dtype).eps / 64, 2 * rounded / elements.sqrt())
        assert ours <= theirs + SLACK + random, f"off by {ours:.3g} of the norm, the eager path by {theirs:.3g}"


def count_matmuls(monkeypatch, backend):
    """[(M, K) of each matmul of a head that the backend's module runs]"""
    shapes = []
    matmul_into = backend.matmul_into

    def counted(out, a, b, **options):
        shapes.append(tuple(a.shape))
        return matmul_into(out, a, b, **options)

    monkeypatch.setattr(backend, "matmul_into", counted)
    return shapes


def logits(hidden, weight, bias, dtype, *, softcap=None, scale=1.0):
    """Logits in float64, or as eager torch computes them: the matmul in the dtype of hidden, the rest in float32."""
    if dtype == torch.float64:
        hidden, weight, bias = (None if x is None else x.double() for x in (hidden, weight, bias))
    out = torch.nn.functional.linear(hidden, weight, bias).to(dtype) * scale
    return out if softcap is None else softcap * torch.tanh(out / softcap)
