"""Overridden operators behave like torch except for the bits, on torch's own samples of their arguments."""

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("expecttest", reason="torch's own samples need it")
from torch_operators import assert_ends_alike, gradients, operators, outcome, places_for, samples

from minirl_kernels import batch_invariant_mode
from minirl_kernels.batch_invariant import audit
from minirl_kernels.batch_invariant.operations import operations

pytestmark = pytest.mark.usefixtures("cpu")
OPERATORS = operators()
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# torch's gelu writes into contiguous outputs only, and leaves others unchanged
WRONG_IN_TORCH = {("nn.functional.gelu", "every other element"), ("nn.functional.gelu", "a transpose")}


def called(op, *arguments):
    input, args, kwargs = arguments
    return op(input, *args, **kwargs)


def supported(op, dtypes):
    return [dtype for dtype in dtypes if op.supports_dtype(dtype, "cpu")]


@pytest.mark.parametrize("name", OPERATORS)
def test_values_shapes_strides_and_dtypes(name):
    op = OPERATORS[name]
    for dtype in supported(op, [*FLOATS, torch.float64, torch.complex64, torch.int64]):
        for sample in samples(op, dtype, at_most=8 if dtype == torch.float32 else 3):
            where = f"{name} of {sample.summary()}"
            assert_ends_alike(lambda *a: called(op, *a), sample.input, sample.args, sample.kwargs, where=where)


@pytest.mark.parametrize("name", [name for name, op in OPERATORS.items() if op.supports_out])
def test_results_in_given_memory(name):
    op = OPERATORS[name]

    def into(out, *arguments):
        assert called(lambda *args, **kwargs: op(*args, **kwargs, out=out), *arguments) is out
        return out

    for dtype in (torch.float32, torch.bfloat16):
        for sample in samples(op, dtype, at_most=2):
            result = outcome(lambda sample=sample: op(sample.input, *sample.args, **sample.kwargs)).tensors[0]
            for place, out in places_for(result).items():
                if (name, place) in WRONG_IN_TORCH:
                    continue
                where = f"{name} into {place}, of {sample.summary()}"
                assert_ends_alike(into, out, sample.input, sample.args, sample.kwargs, where=where)


@pytest.mark.parametrize("name", [name for name, op in OPERATORS.items() if op.inplace_variant])
def test_results_in_place(name):
    op = OPERATORS[name].inplace_variant
    for dtype in (torch.float32, torch.bfloat16):
        for sample in samples(OPERATORS[name], dtype, at_most=3):
            where = f"{name} in place, of {sample.summary()}"
            assert_ends_alike(lambda *a: called(op, *a), sample.input, sample.args, sample.kwargs, where=where)
            expanded = sample.input.new_ones(()).expand(sample.input.shape)
            assert_ends_alike(lambda *a: called(op, *a), expanded, sample.args, sample.kwargs, where=where)


@pytest.mark.parametrize("name", [name for name, op in OPERATORS.items() if op.supports_autograd])
def test_gradients_and_their_gradients(name):
    op = OPERATORS[name]
    for dtype in supported(op, [torch.float32, torch.bfloat16]):
        for sample in samples(op, dtype, requires_grad=True, at_most=3):
            for twice in (False, True) if op.supports_gradgrad else (False,):

                def derived(input, args, kwargs, sample=sample, twice=twice):
                    return gradients(op, type(sample)(input, args=args, kwargs=kwargs), twice=twice)

                where = f"gradients{' twice' * twice} of {name} of {sample.summary()}"
                assert_ends_alike(derived, sample.input, sample.args, sample.kwargs, where=where, units=32)


@pytest.mark.parametrize("name", [name for name, op in OPERATORS.items() if op.error_inputs_func])
def test_errors(name):
    op = OPERATORS[name]
    for bad in op.error_inputs("cpu"):
        sample = bad.sample_input
        where = f"{name} of {sample.summary()}"
        assert_ends_alike(lambda *a: called(op, *a), sample.input, sample.args, sample.kwargs, where=where)


def test_samples_of_floats_run_as_ours():
    """Control: the samples run the overrides; otherwise the tests above would compare torch with itself."""
    overridden = {f"aten::{name.partition('.')[0]}" for name, _ in operations("CPU")}
    covered = set()
    for op in OPERATORS.values():
        for sample in samples(op, torch.float32, at_most=3):
            with batch_invariant_mode(), audit() as found:
                op(sample.input, *sample.args, **sample.kwargs)
            covered |= {call.split()[0] for call in found.covered}
            own = [call for call in found.not_covered if call.split()[0] in overridden and "float64" not in call]
            # tensor exponents are not overridden, and a scalar has no softmax dimension
            assert not own or "pow" in op.name or not sample.input.dim(), f"{op.name} of {sample.summary()}: {own}"
    forward = {name for name in overridden if "backward" not in name and not name.endswith("_")}
    assert forward - covered == {"aten::_grouped_mm", "aten::pow"}  # torch has no samples for these two


x, matrix, batch, vector = torch.ones(4, 6), torch.ones(6, 5), torch.ones(2, 4, 6), torch.ones(6)
CALLS = {
    "sum over a dimension that is none": lambda: x.sum(7),
    "sum over a dimension twice": lambda: x.sum((0, 0)),
    "sum over a dimension twice, from both ends": lambda: x.mean((1, -1)),
    "sum of a number over its second dimension": lambda: torch.tensor(2.0).sum(1),
    "sum of a number over its first dimension": lambda: torch.tensor(2.0).sum(0),
    "sum over no dimension": lambda: (x.sum([]), x.sum([], keepdim=True), x.mean(())),
    "mean of nothing": lambda: (x[:0].mean(), x[:0].mean(0), x[:0].sum(1, keepdim=True)),
    "mean in integers": lambda: x.mean(dtype=torch.int64),
    "sum in other dtypes": lambda: [x.sum(1, dtype=dtype) for dtype in (torch.int32, torch.float64, torch.bfloat16)],
    "bmm of matrices": lambda: torch.bmm(x, matrix),
    "bmm of two batches of other sizes": lambda: torch.bmm(batch, matrix[None]),
    "mm of batches": lambda: torch.mm(batch, batch.mT),
    "mm of a matrix and a vector": lambda: torch.mm(x, vector),
    "mm of other sizes": lambda: torch.mm(x, x),
    "matmul of other sizes": lambda: x @ x,
    "mv of other sizes": lambda: torch.mv(x, torch.ones(5)),
    "mv of two matrices": lambda: torch.mv(x, matrix),
    "dot of other sizes": lambda: torch.dot(vector, torch.ones(5)),
    "addmm to what does not broadcast": lambda: torch.addmm(torch.ones(3), x, matrix),
    "addmm in place of what must grow": lambda: torch.ones(5).addmm_(x, matrix),
    "addmm by a complex number": lambda: torch.addmm(torch.ones(4, 5), x, matrix, alpha=1j),
    "linear of other sizes": lambda: F.linear(batch, matrix, torch.ones(6)),
    "linear with too long a bias": lambda: F.linear(batch, matrix.T, torch.ones(6)),
    "linear with a bias that broadcasts": lambda: F.linear(batch, matrix.T, torch.ones(1)),
    "linear with a matrix of biases": lambda: F.linear(batch, matrix.T, torch.ones(4, 5)),
    "linear by a vector": lambda: F.linear(batch, vector),
    "linear of nothing": lambda: F.linear(batch[:, :0], matrix.T, torch.ones(5)),
    "linear of nothing with too long a bias": lambda: F.linear(x[:0], matrix.T, torch.ones(3)),
    "linear of nothing with a matrix of biases": lambda: F.linear(batch[:0], matrix.T, torch.ones(3, 5)),
    "linear over nothing": lambda: F.linear(batch[..., :0], matrix.T[:, :0], torch.ones(5)),
    "linear of a vector": lambda: F.linear(vector, matrix.T, torch.ones(5)),
    "linear of five dimensions": lambda: F.linear(batch[:, None, :, None].mT.mT, matrix.T, torch.ones(5)),
    "linear in two dtypes": lambda: F.linear(batch, matrix.T, torch.ones(5).bfloat16()),
    "gelu approximated by what is unknown": lambda: F.gelu(x, approximate="asdf"),
    "softplus of a complex number": lambda: F.softplus(x, 1j),
    "pow by a complex number": lambda: x**1j,
    "softmax over a dimension that is none": lambda: x.softmax(2),
    "softmax of a number": lambda: (torch.tensor(2.0).softmax(0), torch.tensor(2.0).log_softmax(-1)),
    "softmax of half into float": lambda: torch.ops.aten._softmax(x.half(), 1, True),
    "softmax off the last dimension, flat": lambda: (batch.softmax(1).view(-1), batch.log_softmax(0).view(-1)),
    "a gradient of another dtype": lambda: torch.ops.aten.silu_backward(x.bfloat16(), x),
    "a gradient that broadcasts": lambda: torch.ops.aten.silu_backward(vector, x),
    "grouped_mm of other sizes": lambda: F.grouped_mm(x, x[None], offs=torch.tensor([4], dtype=torch.int32)),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_a_call_ends_as_it_does_in_torch(name):
    assert_ends_alike(CALLS[name], where=name)


def test_a_product_over_its_own_factor_is_right():
    """Without the mode, torch reads values that it has already overwritten."""
    square = torch.ones(3, 3)
    with batch_invariant_mode():
        assert (torch.mm(square, square, out=square) == 3).all()
        assert (square.addmm_(square, square) == 30).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "transposed", "expanded"])
def test_cross_entropy_of_pictures(layout, dtype):
    gen = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 5, 4, 3, generator=gen).to(dtype)
    scores = {
        "contiguous": scores,
        "channels last": scores.contiguous(memory_format=torch.channels_last),
        "transposed": scores.transpose(2, 3),
        "expanded": scores[..., :1].expand(2, 5, 4, 3),
    }[layout]
    target = torch.randint(5, (2, *scores.shape[2:]), generator=gen)

    def loss_and_gradient(scores):
        scores.requires_grad_()
        loss = F.cross_entropy(scores, target)
        return loss, torch.autograd.grad(loss, scores)[0], scores.softmax(1), scores.log_softmax(0)

    assert_ends_alike(loss_and_gradient, scores, where=layout)
