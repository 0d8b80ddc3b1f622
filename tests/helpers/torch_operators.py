"""Torch's samples of its operators (OpInfo), and checks that a call in the mode ends as in plain torch."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import OpInfo, SampleInput
from torch.utils._pytree import tree_leaves, tree_map

from minirl_kernels import batch_invariant_mode

# operators that call, directly or indirectly, an operation that the mode overrides
NAMES = frozenset(
    (
        "__rmatmul__",
        "__rpow__",
        "addbmm",
        "addmm",
        "addmv",
        "baddbmm",
        "bmm",
        "dot",
        "einsum",
        "exp2",
        "float_power",
        "inner",
        "linalg.multi_dot",
        "log_softmax",
        "logsumexp",
        "masked.log_softmax",
        "masked.softmax",
        "matmul",
        "mean",
        "mm",
        "mv",
        "nn.functional.bilinear",
        "nn.functional.cross_entropy",
        "nn.functional.gelu",
        "nn.functional.layer_norm",
        "nn.functional.linear",
        "nn.functional.mish",
        "nn.functional.rms_norm",
        "nn.functional.silu",
        "nn.functional.softmin",
        "nn.functional.softplus",
        "pow",
        "rsqrt",
        "sigmoid",
        "softmax",
        "_softmax_backward_data",
        "sum",
        "sum_to_size",
        "tensordot",
        "vdot",
    )
)


def operators() -> dict[str, OpInfo]:
    """The operators by name and variant."""
    found = [op for op in op_db if op.name in NAMES and "triton" not in op.variant_test_name]
    assert {op.name for op in found} == NAMES
    return {" ".join(filter(None, (op.name, op.variant_test_name))): op for op in found}


@dataclass
class Outcome:
    """The end of a call: the returned tensors or the raised error, and the warnings."""

    tensors: list[torch.Tensor]
    error: Exception | None
    warnings: list[str]

    def form(self) -> tuple:
        """Everything except the values of the tensors."""
        if self.error is not None:
            return type(self.error), str(self.error)
        return [(x.dtype, x.shape, x.stride(), x.requires_grad) for x in self.tensors], self.warnings


def outcome(call: Callable) -> Outcome:
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            out, error = call(), None
        except Exception as raised:
            out, error = None, raised
    torch.set_warn_always(before)
    tensors = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
    return Outcome(tensors, error, [str(warning.message) for warning in caught])


def copied(values):
    """A copy in which each tensor has its own memory and keeps its strides; overlapping elements stay so."""

    def copy(x):
        if not isinstance(x, torch.Tensor):
            return x
        size = x.untyped_storage().size() // x.element_size()
        memory = x.detach().as_strided((size,), (1,), 0).clone()
        return memory.as_strided(x.shape, x.stride(), x.storage_offset()).requires_grad_(x.requires_grad)

    return tree_map(copy, values)


def assert_ends_alike(call: Callable, *values, where: str, units: int = 8) -> Outcome:
    """call(*values) ends the same with and without the mode: values up to rounding, all else exactly."""
    stock = outcome(lambda: call(*copied(values)))
    with batch_invariant_mode():
        ours = outcome(lambda: call(*copied(values)))
    assert ours.form() == stock.form(), f"{where}: {ours.form()} rather than {stock.form()}"
    for actual, expected in zip(ours.tensors, stock.tensors, strict=True):
        assert_close(actual, expected, where, units)
    return stock


def assert_close(actual: torch.Tensor, expected: torch.Tensor, where: str, units: int) -> None:
    """Values differ by at most `units` in the last place of the largest value.

    The error of a sum is relative to its terms, so another order of summation stays within it.
    """
    if not (expected.is_floating_point() or expected.is_complex()) or not expected.numel():
        assert torch.equal(actual, expected), where
        return
    finite = expected[expected.isfinite()].abs()
    largest = max(1.0, finite.max().item()) if finite.numel() else 1.0
    allowed = units * torch.finfo(expected.dtype).eps * largest
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=allowed, equal_nan=True, msg=lambda words: f"{where}: {words}"
    )


def samples(op: OpInfo, dtype: torch.dtype, requires_grad: bool = False, at_most: int = 40) -> Iterator[SampleInput]:
    """At most `at_most` samples of torch, evenly chosen, each also with strides that are not contiguous."""
    every = _all_samples(op.formatted_name, dtype, requires_grad)
    for sample in every[:: -(-len(every) // at_most)]:
        yield sample
        yield sample.noncontiguous()


@functools.cache
def _all_samples(name: str, dtype: torch.dtype, requires_grad: bool) -> list[SampleInput]:
    torch.manual_seed(0)
    op = next(op for op in op_db if op.formatted_name == name)
    return list(op.sample_inputs("cpu", dtype, requires_grad))


def places_for(result: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tensors for the argument `out` of a result, valid and invalid."""
    shape, dtype = result.shape, result.dtype
    places = {
        "one that is right": torch.empty(shape, dtype=dtype),
        "one of no size": torch.empty(0, dtype=dtype),
        "one of another shape": torch.ones(3, 2, 4, dtype=dtype),
        "every other element": torch.empty(*shape, 2, dtype=dtype)[..., 0],
    }
    for other in (torch.float64, torch.bfloat16, torch.int64, torch.complex64):
        if other != dtype:
            places[f"one of {other}"] = torch.ones(shape, dtype=other)
    if result.dim():
        places["a transpose"] = torch.empty(shape[::-1], dtype=dtype).permute(*reversed(range(result.dim())))
        places["an expanded one"] = torch.ones(1, *shape[1:], dtype=dtype).expand(shape)
        places["an overlapping one"] = torch.ones(result.numel() + 1, dtype=dtype).as_strided(shape, [1] * len(shape))
    return places


def gradients(op: Callable, sample: SampleInput, *, twice: bool) -> list[torch.Tensor | None]:
    """The gradients by the leaves, or with twice=True the gradients of these gradients.

    The upstream gradients are the same in every call.
    """
    values = tree_leaves((sample.input, sample.args, sample.kwargs))
    leaves = [x for x in values if isinstance(x, torch.Tensor) and x.requires_grad]
    results = [op(sample.input, *sample.args, **sample.kwargs)]
    torch.manual_seed(1)
    for again in (True, False) if twice else (False,):
        results = [x for x in tree_leaves(results) if isinstance(x, torch.Tensor) and x.requires_grad]
        if not results:
            return []
        upstream = [torch.randn_like(x) for x in results]
        results = torch.autograd.grad(results, leaves, upstream, create_graph=again, allow_unused=True)
    return list(results)
