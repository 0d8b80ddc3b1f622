"""The list of invariant operations in known.py: each claim is sampled, and operations that differ are not listed."""

from functools import partial

import pytest
import torch
from dtypes import DTYPES
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from minirl_kernels.batch_invariant.known import CONDITIONS, INVARIANT, INVARIANT_ON_GPU, is_invariant

aten = torch.ops.aten
SIZE = 960  # a multiple of every vector width

UNARY = {
    "any number": (
        "abs asinh atan ceil cos digamma erf erfc exp expm1 floor frac hardshrink hardsigmoid hardswish hardtanh i0 "
        "leaky_relu lgamma log_sigmoid_forward nan_to_num neg positive relu round sign sin sinc softshrink square tan "
        "tanh trunc"
    ),
    "above 0": "log log10 log1p log2 reciprocal sqrt",
    "above 1": "acosh",
    "within 1": "acos asin",
}
BINARY = (
    "copysign div fmax fmin fmod hardsigmoid_backward hardswish_backward hypot maximum minimum mul nextafter remainder "
    "sigmoid_backward tanh_backward"
)
TERNARY = {
    "add": lambda x, y, z: aten.add(x, y),
    "addcdiv": lambda x, y, z: aten.addcdiv(x, y, z, value=0.3),
    "addcmul": lambda x, y, z: aten.addcmul(x, y, z, value=0.3),
    "clamp": lambda x, y, z: aten.clamp(x, -1.0, 1.5),
    "div": lambda x, y, z: aten.div(x, 1.7),
    "hardtanh_backward": lambda x, y, z: aten.hardtanh_backward(x, y, -1.0, 1.0),
    "huber_loss_backward": lambda x, y, z: aten.huber_loss_backward(x, y, z, 0, 1.0),
    "leaky_relu_backward": lambda x, y, z: aten.leaky_relu_backward(x, y, 0.1, False),
    "lerp": lambda x, y, z: aten.lerp(x, y, z),
    "log_sigmoid_backward": lambda x, y, z: aten.log_sigmoid_backward(x, y, aten.log_sigmoid_forward(y)[1]),
    "masked_fill": lambda x, y, z: aten.masked_fill(x, y > z, 0.5),
    "mse_loss_backward": lambda x, y, z: aten.mse_loss_backward(x, y, z, 0),
    "polar": lambda x, y, z: torch.view_as_real(aten.polar(x.float(), y.float())),
    "pow": lambda x, y, z: torch.stack([aten.pow(x.abs() + 0.1, e) for e in (-2, -1, 0, 0.5, 1, 2, 3)], -1),
    "smooth_l1_loss_backward": lambda x, y, z: aten.smooth_l1_loss_backward(x, y, z, 0, 1.0),
    "sub": lambda x, y, z: aten.sub(x, y, alpha=-1),
    "threshold_backward": lambda x, y, z: aten.threshold_backward(x, y, 0.1),
    "where": lambda x, y, z: aten.where(x > y, y, z),
    "xlogy": lambda x, y, z: aten.xlogy(x, y.abs() + 0.1),
}


def values(size, seed=0):
    gen = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn(size, generator=gen)
    x[1::5] *= 20
    return x


def places(function, tensors):
    """Flat results for the same elements: in short pieces, strided, and in short rows."""
    for length in (1, 15, 31):
        pieces = zip(*(x.split(length) for x in tensors), strict=True)
        yield torch.cat([function(*(x.clone() for x in piece)) for piece in pieces])
    strided = (torch.empty(SIZE, 2, dtype=x.dtype)[:, 0].copy_(x) for x in tensors)
    yield function(*strided)
    rows = (torch.empty(SIZE // 15, 17, dtype=x.dtype)[:, :15].copy_(x.view(-1, 15)) for x in tensors)
    yield function(*rows).flatten(0, 1)


def assert_one_path(function, tensors, name):
    whole = function(*tensors)
    for out in places(function, tensors):
        torch.testing.assert_close(out, whole, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{name}: {m}")


def first_result(op, x):
    result = op(x)
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pointwise_claims(dtype):
    x, y, z = (values(SIZE, seed).to(dtype) for seed in range(3))
    domains = {
        "any number": x,
        "above 0": x.abs() + 0.01,
        "above 1": x.abs() + 1.01,
        "within 1": x.float().div(200).clamp(-0.99, 0.99).to(dtype),
    }
    for domain, names in UNARY.items():
        for name in names.split():
            assert f"aten::{name}" in INVARIANT, name
            assert_one_path(partial(first_result, getattr(aten, name)), [domains[domain]], name)
    for name in BINARY.split():
        assert f"aten::{name}" in INVARIANT, name
        assert_one_path(getattr(aten, name), [x, y], name)
    for name, function in TERNARY.items():
        assert f"aten::{name}" in INVARIANT | CONDITIONS.keys(), name
        assert_one_path(function, [x, y, z], name)


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="torch has no vectors here that differ"
)
def test_what_differs_is_not_claimed():
    """Each operation differs on this machine, by the same method that tests the claims."""
    differ = {
        "elu": (aten.elu.default, lambda x, y: aten.elu(x), torch.float32),
        "exp2": (aten.exp2.default, lambda x, y: aten.exp2(x), torch.float32),
        "gelu": (aten.gelu.default, lambda x, y: aten.gelu(x, approximate="tanh"), torch.float32),
        "logaddexp": (aten.logaddexp.default, aten.logaddexp, torch.float32),
        "mish": (aten.mish.default, lambda x, y: aten.mish(x), torch.float32),
        "rsqrt": (aten.rsqrt.default, lambda x, y: aten.rsqrt(x.abs()), torch.bfloat16),
        "sigmoid": (aten.sigmoid.default, lambda x, y: aten.sigmoid(x), torch.float32),
        "silu": (aten.silu.default, lambda x, y: aten.silu(x), torch.float32),
        "silu_backward": (aten.silu_backward.default, aten.silu_backward, torch.float32),
        "softplus": (aten.softplus.default, lambda x, y: aten.softplus(x), torch.float32),
    }
    for name, (op, function, dtype) in differ.items():
        tensors = [values(SIZE, seed).to(dtype) for seed in range(2)]
        whole = function(*tensors)
        assert any(not torch.equal(out, whole) for out in places(function, tensors)), name
        assert not is_invariant(op, tuple(tensors)), name
    # either the vector code or the scalar code fuses alpha with the sum
    tensors = [values(SIZE, seed).bfloat16() for seed in range(2)]
    scaled = lambda x, y: aten.add(x, y, alpha=0.3)  # noqa: E731
    assert any(not torch.equal(out, scaled(*tensors)) for out in places(scaled, tensors))
    assert not is_invariant(aten.add.Tensor, tuple(tensors), {"alpha": 0.3})
    assert is_invariant(aten.add.Tensor, tuple(tensors))
    power = lambda x: aten.pow(x, 0.3)  # noqa: E731
    tensors = [values(SIZE).abs() + 0.1]
    assert any(not torch.equal(out, power(*tensors)) for out in places(power, tensors))
    assert not is_invariant(aten.pow.Tensor_Scalar, (*tensors, 0.3))


def rows(count, width, dtype):
    """Rows whose sums cancel, so that any other order of summation changes the bits."""
    gen = torch.Generator().manual_seed(0)
    half = torch.randn(count, width // 2, generator=gen) * torch.exp2(
        torch.randint(-8, 8, (count, width // 2), generator=gen).float()
    )
    x = torch.cat([half, -half, torch.zeros(count, width % 2)], 1)
    return x[:, torch.randperm(width, generator=gen)].to(dtype)


ROW_OPS = {
    "argmax": lambda x: aten.argmax(x, -1),
    "cumsum": lambda x: aten.cumsum(x, -1),
    "cumprod": lambda x: aten.cumprod(x.clamp(-1.1, 1.1), -1),
    "amax": lambda x: aten.amax(x, [-1]),
    "max": lambda x: aten.max(x.round(), -1)[1],
    "native_layer_norm": lambda x: aten.native_layer_norm(x, [x.shape[-1]], None, None, 1e-5)[0],
    "sort": lambda x: aten.sort(x.round(), -1)[1],
    "topk": lambda x: aten.topk(x.round(), min(5, x.shape[-1]))[1],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ROW_OPS)
def test_row_claims(name, dtype, threads):
    """A row alone, in a batch, and on two threads; wide rows are as long as one thread's share of work."""
    function = ROW_OPS[name]
    assert f"aten::{name}" in INVARIANT
    for width in (1, 7, 100, 1023, 40_000):
        x = rows(70 if width < 2000 else 5, width, dtype)
        threads(1)
        whole = function(x)
        for count in (1, 2):
            threads(count)
            assert torch.equal(function(x), whole)
            for part in (slice(0, 1), slice(2, 5), slice(1, 4)):
                assert torch.equal(function(x[part].clone()), whole[part]), (width, part)


def test_a_sum_of_a_single_long_row_depends_on_threads(threads):
    """Control of the test above: sum is listed for integers only, since float sums depend on the threads."""
    x = rows(5, 40_000, torch.float32)
    threads(2)
    assert not torch.equal(aten.sum(x[:1], [-1]), aten.sum(x, [-1])[:1])
    assert not is_invariant(aten.sum.dim_IntList, (x, [-1]))
    assert is_invariant(aten.sum.dim_IntList, (x.long(), [-1]))
    assert not is_invariant(aten.sum.dim_IntList, (x.long(), [-1]), {"dtype": torch.float32})


SCATTERS = {
    "embedding_dense_backward": lambda grad, ids: aten.embedding_dense_backward(grad, ids, 50, -1, False),
    "index_add": lambda grad, ids: aten.index_add(grad.new_zeros(50, 64), 0, ids, grad),
    "scatter_add": lambda grad, ids: aten.scatter_add(grad.new_zeros(50, 64), 0, ids[:, None].expand(-1, 64), grad),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SCATTERS)
def test_scatter_claims(name, dtype, threads):
    """A scattered sum has the same bits for any other sums beside it, and for any number of threads."""
    function, ids = SCATTERS[name], torch.randint(50, (3000,), generator=torch.Generator().manual_seed(1))
    assert f"aten::{name}" in INVARIANT
    grad = rows(64, 3000, dtype).T.contiguous()
    threads(1)
    whole = function(grad, ids)
    few = ids < 9
    for count in (1, 2):
        threads(count)
        assert torch.equal(function(grad, ids), whole)
        assert torch.equal(function(grad[few], ids[few])[:9], whole[:9])


def test_accumulating_index_put_is_not_claimed_unless_deterministic(threads):
    """Two threads add float32 values in the order of arrival, which is sometimes the right order."""
    grad, zeros = rows(64, 3000, torch.float32).T.contiguous(), torch.zeros(50, 64)
    ids = [torch.randint(50, (3000,), generator=torch.Generator().manual_seed(1))]
    call = (zeros, ids, grad, True)
    assert is_invariant(aten.index_put.default, call[:3])
    assert not is_invariant(aten.index_put.default, call)
    assert not is_invariant(aten.index_put_.default, call)
    threads(1)
    expected = aten.index_put(*call)
    threads(2)
    torch.use_deterministic_algorithms(True)
    try:
        assert is_invariant(aten.index_put.default, call)
        assert torch.equal(aten.index_put(*call), expected)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embedding_and_the_losses_of_tokens(dtype):
    table, ids = rows(50, 64, dtype), torch.arange(70) % 50
    whole = aten.embedding(table, ids)
    assert torch.equal(aten.embedding(table, ids[3:8]), whole[3:8])
    log_probs = table.log_softmax(-1)
    losses = aten.nll_loss_forward(log_probs, ids[:50], None, 0, -100)[0]
    assert torch.equal(aten.nll_loss_forward(log_probs[3:8], ids[3:8], None, 0, -100)[0], losses[3:8])


def test_conditions():
    x, i = torch.ones(4), torch.ones(4, dtype=torch.int64)
    assert is_invariant(aten.add_.Tensor, (x, x))
    assert is_invariant(aten.add.Tensor, (i, i), {"alpha": 3})
    assert is_invariant(aten.rsub.Scalar, (x, 1))
    assert not is_invariant(aten.sub.Tensor, (x, x), {"alpha": 0.5})
    assert is_invariant(aten.pow.Tensor_Scalar, (x, 2))
    assert not is_invariant(aten.pow.Tensor_Tensor, (x, x))
    assert not is_invariant(aten.pow.Scalar, (2.0, x))
    assert is_invariant(aten.floor_divide.default, (i, 2))
    assert not is_invariant(aten.floor_divide.default, (x, 2.0))
    assert is_invariant(aten.arange.default, (5,))
    assert not is_invariant(aten.arange.start_step, (0, 1, 0.1))
    assert is_invariant(aten.scatter.src, (x, 0, i, x))
    assert not is_invariant(aten.scatter.reduce, (x, 0, i, x), {"reduce": "add"})
    assert not is_invariant(aten.mm.default, (x[None], x[:, None]))
    assert not is_invariant(aten.bernoulli.default, (x,))
    assert not is_invariant(torch.ops.minirl_kernels.elementwise.default, (x, "silu", 0.0, 0.0, "cpu"))


def test_a_gpu_has_scalar_code_for_every_element_but_shares_sums():
    """Elementwise operations with vector code on a CPU are invariant on a GPU; sums that threads share are not."""
    with FakeTensorMode():
        on_cpu, on_gpu = torch.ones(4, 8), torch.ones(4, 8, device="cuda")
    for op, *more in (
        (aten.rsqrt.default,),
        (aten.silu.default,),
        (aten.silu_backward.default, None),
        (aten.pow.Tensor_Scalar, 0.3),
    ):
        assert not is_invariant(op, (on_cpu, *(on_cpu if x is None else x for x in more)))
        assert is_invariant(op, (on_gpu, *(on_gpu if x is None else x for x in more)))
    assert not is_invariant(aten.add.Tensor, (on_cpu, on_cpu), {"alpha": 0.5})
    assert is_invariant(aten.add.Tensor, (on_gpu, on_gpu), {"alpha": 0.5})
    assert is_invariant(aten.cumsum.default, (on_cpu, -1))
    assert not is_invariant(aten.cumsum.default, (on_gpu, -1))
    assert not is_invariant(aten.sum.dim_IntList, (on_gpu, [-1]))


def test_names_are_atens():
    """Every listed name exists in torch; a wrong name would list nothing."""
    names = sorted(INVARIANT | INVARIANT_ON_GPU | CONDITIONS.keys())
    assert [name for name in names if not hasattr(aten, name.removeprefix("aten::"))] == []
    assert not INVARIANT & CONDITIONS.keys()


class _Unknown(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not is_invariant(func, args, kwargs):
            self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_what_a_model_leaves_unknown():
    """Forward and backward of a small mixture of experts: the unlisted operations are the ones the mode overrides."""
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    ids = torch.randint(1, 64, (3, 10))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with _Unknown() as unknown:
        model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    assert {name.removeprefix("aten::") for name in unknown.names} == {
        *("_log_softmax", "_log_softmax_backward_data", "_softmax", "_softmax_backward_data"),
        *("bmm", "index_put", "mean", "mm", "rsqrt", "silu", "silu_backward", "sum"),
    }
