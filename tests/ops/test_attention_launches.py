"""The launches of attention: their number, the rows that they write, and bad spans. In Triton's interpreter."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
import triton_cases
from attention_cases import cancelling_case, normal, ours, padded, random_case
from dtypes import DTYPES
from kernel_counts import kernels, waits
from policy_batches import assert_same_bits
from torch import Tensor
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import interpreter_builder
from verify.interpreter import recording
from verify.launches import captured
from verify.ownership import conflicts, unwritten

from minirl_kernels import attention
from minirl_kernels.ops.attention import attention_over_spans, triton
from minirl_kernels.ops.attention.reference import attention_reference

pytestmark = triton_cases.interpreter_only()

FORWARD = "attention_fwd_kernel"
BACKWARD = ["attention_bwd_q_kernel", "attention_bwd_kv_kernel"]


def packed_call():
    """(a call, its operands)."""
    case = random_case([5, 3], [9, 3])
    offsets = {"cu_seqlens_q": case.offsets(case.queries), "cu_seqlens_k": case.offsets(case.keys)}
    leaves = [x.requires_grad_() for x in (case.q, case.k, case.v)]
    return lambda: attention(*leaves, **offsets, backend="triton"), leaves


def padded_call():
    q, k, v, _, spans = padded(random_case([5, 3], [9, 3]), left=True, by_head=True)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    return lambda: attention_over_spans(*leaves, spans, backend="triton"), leaves


@pytest.mark.parametrize("make", [packed_call, padded_call])
def test_one_kernel_forward_and_two_backward(make):
    """Nothing is derived from the spans, and nothing is filled with 0."""
    call, leaves = make()
    with torch.no_grad():
        assert kernels(call) == [FORWARD]
    out = call()
    grad_out = torch.ones_like(out)
    assert kernels(lambda: torch.autograd.grad(out, leaves, grad_out)) == BACKWARD


@pytest.mark.parametrize("make", [packed_call, padded_call])
def test_the_host_waits_for_nothing(make):
    """So a CUDA graph can capture the call."""
    call, leaves = make()
    assert waits(lambda: torch.autograd.grad(call().sum(), leaves)) == []


def spans_of(rows):
    return torch.tensor(rows, dtype=torch.int64).view(-1, 5)


# 70 queries and 140 keys, in two batch entries: more than one block
SPANS = {
    "none": [],
    "whole": [[0, 0, 70, 0, 140], [1, 0, 70, 0, 140]],
    "gaps": [[0, 3, 40, 5, 80], [0, 50, 1, 90, 2], [1, 30, 33, 64, 64]],
    "empty ones": [[0, 0, 0, 0, 0], [0, 0, 9, 0, 0], [0, 9, 0, 0, 9], [1, 70, 0, 140, 0]],
    "many": [[i // 12, 5 * (i % 12), 4, 10 * (i % 12), 7] for i in range(24)],
}


@pytest.mark.parametrize("rows", SPANS.values(), ids=SPANS)
def test_every_row_is_written_once(rows):
    """Rows inside a span have its attention, and the others are 0. NaN outside the spans stays there."""
    spans = spans_of(rows)
    q, k, v = normal(2, 4, 70, 8, seed=1), normal(2, 2, 140, 8, seed=2), normal(2, 2, 140, 16, seed=3)
    outside = []
    for x, column in ((q, 1), (k, 3), (v, 3)):
        outside.append(torch.ones(2, x.shape[1], x.shape[2], dtype=torch.bool))
        for row in rows:
            outside[-1][row[0], :, row[column] : row[column] + row[column + 1]] = False
        x[outside[-1]] = torch.nan
    grad_out = normal(2, 70, 4, 16, seed=4)
    with recording() as launches:
        out, stats = triton.forward(q, k, v, spans, None, True, 0.3, True)
        grads = triton.backward(q, k, v, spans, None, out, stats, grad_out, True, 0.3, (True, True, True))
    assert [fault for launch in launches for fault in conflicts(launch)] == []
    assert unwritten(launches, (out, *grads)) == []
    leaves = [x.nan_to_num().requires_grad_() for x in (q, k, v)]
    expected = attention_reference(*leaves, spans, True, 0.3)
    of_leaves = torch.autograd.grad(expected, leaves, grad_out)
    torch.testing.assert_close(out, expected.detach())
    assert not out.transpose(1, 2)[outside[0]].any()
    for grad, right, rest in zip(grads, of_leaves, outside, strict=True):
        torch.testing.assert_close(grad.transpose(1, 2), right)
        assert not grad.transpose(1, 2)[rest].any()


def assert_refused(run, message):
    """The interpreter evaluates an assertion of the device only where it is told to."""
    checked = replace(interpreter_builder.options, debug=True)
    with mock.patch.object(interpreter_builder, "options", checked), pytest.raises(InterpreterError, match=message):
        run()


@pytest.mark.parametrize(
    "bad", [[1, 4, 6], [0, 4, 5], [0, 4, 7], [0, 7, 6], [0, -1, 6], [-1, 4, 6], [0, 2**40, 6]], ids=str
)
@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k"])
def test_bad_offsets_fail_an_assertion_on_the_device(name, bad):
    q, k = normal(6, 2, 8), normal(6, 1, 8)
    good = {"cu_seqlens_q": torch.tensor([0, 4, 6]), "cu_seqlens_k": torch.tensor([0, 4, 6])}
    attention(q, k, k, **good, backend="triton")
    offsets = {**good, name: torch.tensor(bad)}
    assert_refused(
        lambda: attention(q, k, k, **offsets, backend="triton"), "cu_seqlens_q and cu_seqlens_k must start at 0"
    )


@pytest.mark.parametrize(
    "rows",
    [
        [[0, 0, 6, 0, 5]],
        [[0, 2, 4, 0, 5]],
        [[0, 0, 5, 4, 3]],
        [[2, 0, 1, 0, 1]],
        [[-1, 0, 1, 0, 1]],
        [[0, -1, 1, 0, 1]],
        [[0, 0, -1, 0, 1]],
        [[0, 0, 1, 0, 2**62]],
        [[1, 0, 5, 0, 6], [0, 0, 5, 0, 6]],
        [[0, 0, 3, 0, 3], [0, 2, 3, 3, 3]],
        [[0, 0, 3, 0, 4], [0, 3, 2, 3, 3]],
    ],
    ids=str,
)
def test_bad_spans_fail_an_assertion_on_the_device(rows):
    """Spans outside of the operands, in another order than their rows, or with common rows."""
    q, k = normal(2, 2, 5, 8), normal(2, 1, 6, 8)
    assert_refused(lambda: attention_over_spans(q, k, k, spans_of(rows), backend="triton"), "spans must be inside")


def off_by_one(x: Tensor) -> Tensor:
    """The same values, at an address that is no multiple of 16 bytes."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def with_a_gap(x: Tensor) -> Tensor:
    """The same values, in rows that begin at odd elements."""
    return torch.cat([x, x.new_zeros(*x.shape[:-1], 1)], -1)[..., :-1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [16, 21])
def test_one_binary_for_every_layout_of_memory(size, dtype):
    """A GPU adds in the order of a binary, and the compiler makes one for each alignment of addresses and strides."""

    def bound(case):
        with captured() as launches:
            ours(case, "triton")
        addresses = [arg.data_ptr() % 16 for launch in launches for arg in launch.args[:3]]
        return addresses, [{**launch.kwargs, "types": [type(arg) for arg in launch.args]} for launch in launches]

    case = random_case([9, 4], size=size, dtype=dtype) if size % 2 else cancelling_case([9, 4], size=size, dtype=dtype)
    expected, results = bound(case), ours(case, "triton")
    for layout in (off_by_one, with_a_gap):
        moved = replace(case, **{name: layout(getattr(case, name)) for name in ("q", "k", "v", "upstream")})
        assert bound(moved) == expected
        assert_same_bits(ours(moved, "triton"), results)
