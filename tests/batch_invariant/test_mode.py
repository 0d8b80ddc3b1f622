"""The mode: covered operations have the same bits in every batch, in the threads where it is on, and nowhere else."""

import subprocess
import sys
import threading

import pytest
import torch
from dtypes import DTYPES
from policy_batches import SLACK
from torch.nn import functional as F

from minirl_kernels import batch_invariant_mode, linear_token_logprobs
from minirl_kernels.batch_invariant import (
    audit,
    disable_batch_invariant_mode,
    enable_batch_invariant_mode,
    is_batch_invariant,
)
from minirl_kernels.batch_invariant.operations import operations

pytestmark = pytest.mark.usefixtures("cpu")
K, N = 1560, 96


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def cancelling(rows, dtype):
    """(x, w) whose product, and the sum of x, are 0 except for rounding, so that another order changes the bits."""
    generator = torch.Generator().manual_seed(2)
    # many magnitudes, since sums of numbers with few bits are exact
    scales = 2.0 ** torch.randint(-6, 7, (K // 2,), generator=generator)
    x, w = (normal(rows, K // 2) * scales).to(dtype), normal(N, K // 2, dtype=dtype, seed=1)
    order = torch.randperm(K, generator=generator)
    return torch.cat([x, x], 1)[:, order], torch.cat([w, -w], 1)[:, order]


# {operation: function of a batch of rows x and a weight w, computed per row}
ROWWISE = {
    "linear": lambda x, w: F.linear(x, w),
    "linear with bias": lambda x, w: F.linear(x, w, w[:, 0]),
    "matmul": lambda x, w: x @ w.T,
    "matmul of three dimensions": lambda x, w: x.view(-1, 1, K) @ w.T.expand(len(x), K, N),
    "einsum": lambda x, w: torch.einsum("tk,nk->tn", x, w),
    "mm into a tensor": lambda x, w: torch.mm(x, w.T, out=x.new_empty(len(x), N)),
    "mm into a tensor of no size": lambda x, w: torch.mm(x, w.T, out=x.new_empty(0)),
    "addmm": lambda x, w: torch.addmm(w[:, 1], x, w.T, beta=0.5, alpha=2),
    "addmm in place": lambda x, w: x[:, :N].clone().addmm_(x, w.T),
    "bmm": lambda x, w: torch.bmm(x.unsqueeze(1), w.T.expand(len(x), K, N)),
    "baddbmm": lambda x, w: torch.baddbmm(w[:, :1].T, x.unsqueeze(1), w.T.expand(len(x), K, N)),
    "grouped_mm": lambda x, w: F.grouped_mm(
        x, w.T[None], offs=torch.tensor([len(x)], dtype=torch.int32)
    ),
    "softmax": lambda x, w: F.linear(x, w).mul(1e4).softmax(-1),
    "log_softmax": lambda x, w: F.linear(x, w).mul(1e4).log_softmax(-1, dtype=torch.float32),
    "mean": lambda x, w: (x * w[0].sign()).mean(-1),
    "sum": lambda x, w: (x * w[0].sign()).sum(1, keepdim=True),
    "rms_norm": lambda x, w: F.rms_norm(x, (K,)),
    "silu": lambda x, w: F.silu(x),
    "gelu": lambda x, w: F.gelu(x[:, :77], approximate="tanh"),
    "softplus": lambda x, w: F.softplus(x[:, :77]),
    "sigmoid in place": lambda x, w: x[:, :77].clone().sigmoid_(),
    "pow": lambda x, w: x[:, :77].abs() ** 0.3,
    "square": lambda x, w: x[:, :77] ** 2,
    "rsqrt": lambda x, w: x[:, :77].abs().rsqrt(),
}  # fmt: skip


def rows_that_differ(function, x, w) -> int:
    """Rows of a whole batch that differ from the same rows alone or in other batches."""
    whole = function(x, w)
    parts = [slice(row, row + 1) for row in range(len(x))] + [slice(3, 6), slice(1, 60)]
    return sum(not torch.equal(function(x[part], w), whole[part]) for part in parts)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ROWWISE)
def test_a_row_has_the_same_bits_in_any_batch(name, dtype, threads):
    x, w = cancelling(61, dtype)
    threads(1)
    with batch_invariant_mode():
        whole = ROWWISE[name](x, w)
        assert whole.count_nonzero() > whole.numel() // 4  # otherwise the order would not change bits
        assert rows_that_differ(ROWWISE[name], x, w) == 0
    threads(2)
    with batch_invariant_mode():
        assert torch.equal(ROWWISE[name](x, w), whole)


def test_torch_alone_does_differ(threads):
    """Control: without this difference in torch, the tests above would prove nothing."""
    differing, known = set(), {"linear", "matmul", "silu"}
    for count in (1, 2):
        threads(count)
        for dtype in DTYPES:
            x, w = cancelling(61, dtype)
            differing |= {name for name in known - differing if rows_that_differ(ROWWISE[name], x, w)}
    assert differing == known


def test_products_in_given_memory():
    a, b = normal(5, 7), normal(7, 3, seed=1)
    with batch_invariant_mode(), audit() as found:
        out = torch.empty(0)
        assert torch.mm(a, b, out=out) is out
        assert torch.equal(out, a @ b)
        turned = torch.empty(3, 5).T
        assert torch.equal(torch.mm(a, b, out=turned), out)
        changed = torch.ones(5, 3)
        assert torch.equal(changed.addmm_(a, b, beta=0.5), torch.addmm(torch.ones(5, 3), a, b, beta=0.5))
        batch = torch.ones(2, 5, 3)
        expected = torch.baddbmm(batch, a.expand(2, 5, 7), b.expand(2, 7, 3))
        assert torch.equal(batch.baddbmm_(a.expand(2, 5, 7), b.expand(2, 7, 3)), expected)
        assert torch.equal(torch.mv(a, b[:, 0], out=torch.empty(5)), torch.mv(a, b[:, 0]))
        assert torch.equal(torch.dot(a[0], b[:, 0], out=torch.empty(())), torch.dot(a[0], b[:, 0]))
        with pytest.raises(RuntimeError, match="dtype"):
            torch.mm(a, b, out=torch.empty(5, 3, dtype=torch.float64))
    assert {name.split()[0] for name in found.covered} >= {"aten::mm", "aten::addmm_", "aten::baddbmm_", "aten::mv"}


def test_what_a_gpu_is_given_computes_the_same():
    """The GPU kernels, in Triton's interpreter, get torch's arguments correctly."""
    pytest.importorskip("triton", reason="triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("tests/gpu has it")
    on_gpu = dict(operations("CUDA"))
    a, b, c = normal(5, 16), normal(16, 8, seed=1), normal(5, 8, seed=2)
    for name, arguments in {
        "mm": (a, b),
        "addmm": (c, a, b),
        "bmm": (a[None], b[None]),
        "mv": (a, b[:, 0]),
        "dot": (a[0], b[:, 0]),
        "_softmax": (a, 1, False),
        "_log_softmax": (a, 0, False),
        "_softmax_backward_data": (a, a.softmax(-1), -1, torch.float32),
        "mean.dim": (a, [1], True),
        "sum": (a,),
        "sum.dim_IntList": (a, [0]),
    }.items():
        packet, _, overload = name.partition(".")
        expected = getattr(getattr(torch.ops.aten, packet), overload or "default")(*arguments)
        torch.testing.assert_close(on_gpu[name](*arguments), expected)
    grouped = on_gpu["_grouped_mm"](a, b[None].repeat(2, 1, 1), torch.tensor([2, 5], dtype=torch.int32))
    torch.testing.assert_close(grouped, a @ b)


def test_the_head_on_a_gpu_leaves_the_vendors_matmul():
    pytest.importorskip("triton", reason="triton is not installed")
    from verify.launches import captured

    from minirl_kernels.ops.matmul import triton as kernels

    hidden, weight = normal(6, 32).requires_grad_(), normal(40, 32, seed=1).requires_grad_()
    ids = torch.arange(6)

    def gradients():
        log_probs = linear_token_logprobs(hidden, weight, ids, backend="triton")
        return log_probs.detach(), *torch.autograd.grad(log_probs.sum(), (hidden, weight))

    expected = gradients()
    with batch_invariant_mode():
        for actual, right in zip(gradients(), expected, strict=True):
            torch.testing.assert_close(actual, right)
        with captured() as launches:  # and not run
            gradients()
    assert sum(launch.kernel is kernels.matmul_kernel for launch in launches) >= 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(dtype):
    """Gradients are as exact as torch's, and equal to the gradients of a row alone."""
    x, w, upstream = normal(40, 192, dtype=dtype), normal(64, 192, dtype=dtype, seed=1), normal(40, 64, seed=2)

    def gradients(x, w, upstream):
        x, w = x.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()
        out = F.silu(F.linear(F.rms_norm(x, (192,)), w)).softmax(-1)
        return torch.autograd.grad(out, (x, w), upstream.to(out.dtype))

    stock, exact = gradients(x, w, upstream), gradients(x.double(), w.double(), upstream)
    with batch_invariant_mode():
        ours = gradients(x, w, upstream)
        for row in (0, 7, 39):
            alone, _ = gradients(x[row : row + 1], w, upstream[row : row + 1])
            assert torch.equal(alone[0], ours[0][row])
    for actual, theirs, right in zip(ours, stock, exact, strict=True):
        error, allowed = (actual - right).norm(), (theirs - right).norm()
        assert error <= 1.05 * allowed + SLACK * right.norm()


def test_what_is_not_ours_stays_as_it_is():
    x, w = normal(5, 64).double(), normal(7, 64, seed=1).double()
    integers = torch.arange(12).view(3, 4)
    expected = F.linear(x, w), x.sum(0), x.softmax(-1), integers @ integers.T, integers.sum(), integers.float().sum()
    with batch_invariant_mode():
        found = F.linear(x, w), x.sum(0), x.softmax(-1), integers @ integers.T, integers.sum(), integers.float().sum()
        assert torch.tensor(3.0).softmax(0) == 1
        with pytest.raises(RuntimeError, match="dtype"):
            torch.mm(x.float(), w.T)
    assert all(map(torch.equal, found, expected))


def test_contexts_nest_and_end():
    assert not is_batch_invariant()
    with batch_invariant_mode():
        with batch_invariant_mode():
            assert is_batch_invariant()
        assert is_batch_invariant()
        with batch_invariant_mode(False):
            assert not is_batch_invariant()
        assert is_batch_invariant()
        with pytest.raises(KeyError), batch_invariant_mode():
            raise KeyError
        assert is_batch_invariant()
        x, w = cancelling(9, torch.float32)
        assert torch.equal(F.linear(x, w)[:1], F.linear(x[:1], w))
    assert not is_batch_invariant()


def test_nothing_is_left_behind():
    x, w = cancelling(9, torch.float32)
    before = F.linear(x, w), F.linear(x[:1], w)
    for _ in range(3):
        with batch_invariant_mode():
            inside = F.linear(x, w)
    assert torch.equal(F.linear(x, w), before[0])
    assert torch.equal(F.linear(x[:1], w), before[1])
    assert not torch.equal(inside, before[0])


def test_other_threads_go_their_own_way():
    x, w = cancelling(9, torch.float32)
    stock, seen = F.linear(x, w), []
    with batch_invariant_mode():
        ours = F.linear(x, w)
        thread = threading.Thread(target=lambda: seen.extend([is_batch_invariant(), F.linear(x, w)]))
        thread.start()
        thread.join()
    assert seen[0] is False
    assert torch.equal(seen[1], stock)
    assert not torch.equal(ours, stock)


class _Deeper(torch.autograd.Function):
    """A function whose backward runs a backward, nested so deeply that autograd uses more threads."""

    @staticmethod
    def forward(ctx, x, depth, seen):
        ctx.depth, ctx.seen = depth, seen
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.seen.append((threading.get_ident(), is_batch_invariant()))
        if ctx.depth:
            with torch.enable_grad():
                x = torch.ones(1, requires_grad=True)
                _Deeper.apply(x, ctx.depth - 1, ctx.seen).backward()
        return grad, None, None


def test_autograds_threads_follow_the_one_that_called():
    seen = []
    x = torch.ones(1, requires_grad=True)
    with batch_invariant_mode():
        _Deeper.apply(x, 100, seen).backward()
    assert len({thread for thread, _ in seen}) > 1
    assert all(is_on for _, is_on in seen)
    seen.clear()
    _Deeper.apply(x, 100, seen).backward()
    assert not any(is_on for _, is_on in seen)


def test_enable_and_disable():
    enable_batch_invariant_mode()
    try:
        enable_batch_invariant_mode()
        assert is_batch_invariant()
        x, w = cancelling(9, torch.float32)
        assert torch.equal(F.linear(x, w)[:1], F.linear(x[:1], w))
    finally:
        disable_batch_invariant_mode()
    assert not is_batch_invariant()
    disable_batch_invariant_mode()
    with batch_invariant_mode():
        assert is_batch_invariant()
    assert not is_batch_invariant()


def python(code, monkeypatch, tmp_path, value):
    monkeypatch.setenv("MINIRL_BATCH_INVARIANT", value)
    return subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)


def test_the_environment_turns_it_on_in_every_thread(monkeypatch, tmp_path):
    code = """if True:
        import threading
        import minirl_kernels
        from minirl_kernels.batch_invariant import audit, disable_batch_invariant_mode, is_batch_invariant
        import torch
        def look():
            with audit() as found:
                torch.ones(2, 3) @ torch.ones(3, 2)
            print(is_batch_invariant(), sum(found.covered.values()))
        look()
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        disable_batch_invariant_mode()
        look()
    """
    result = python(code, monkeypatch, tmp_path, "1")
    assert result.stdout.split() == ["True", "1", "True", "1", "False", "0"], result.stderr


def test_the_environment_says_something_else(monkeypatch, tmp_path):
    result = python("import minirl_kernels", monkeypatch, tmp_path, "yes")
    assert "MINIRL_BATCH_INVARIANT is 'yes': it must be 1, 0 or unset" in result.stderr


def test_compiled_functions_run_uncompiled():
    x, w = cancelling(9, torch.float32)
    compiled = torch.compile(lambda x: F.linear(x, w).softmax(-1), fullgraph=True)
    stock = compiled(x)
    with batch_invariant_mode():
        assert torch.equal(compiled(x), F.linear(x, w).softmax(-1))
        assert torch.equal(compiled(x)[:1], compiled(x[:1]))
    assert torch.equal(compiled(x), stock)


def test_a_compiled_function_cannot_enter_it():
    @torch.compile(fullgraph=True, backend="eager")
    def inside(x):
        with batch_invariant_mode():
            return x + 1

    with pytest.raises(Exception, match="inside a compiled function"):
        inside(torch.ones(3))
    assert not is_batch_invariant()


def test_an_audit_in_inference_mode_lists_the_same():
    """In inference mode torch passes undivided composites, such as linear, to a dispatch mode."""
    x, weight = torch.randn(2, 3, 8), torch.randn(8, 8)
    found = {}
    for without_gradient in (torch.no_grad, torch.inference_mode):
        with without_gradient(), batch_invariant_mode(), audit() as found[without_gradient]:
            torch.nn.functional.linear(x, weight, weight[0]).softmax(-1).matmul(weight).logsumexp(-1)
    assert found[torch.no_grad] == found[torch.inference_mode]
    assert found[torch.no_grad].covered.keys() == {
        "aten::addmm (float32)",
        "aten::_softmax (float32)",
        "aten::mm (float32)",
    }
    assert found[torch.no_grad].not_covered.keys() == {"aten::logsumexp (float32)"}


def test_audit():
    x, w = cancelling(5, torch.bfloat16)
    with batch_invariant_mode(), audit() as found:
        F.linear(x, w).relu().softmax(-1).sum()
        F.conv1d(x[None].float(), w[:5, None, :3].expand(5, 5, 3).float())
        F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None])
    assert {name.split()[0] for name in found.covered} == {"aten::mm", "aten::_softmax", "aten::sum"}
    names = {name.split()[0] for name in found.not_covered}
    assert "aten::convolution" in names
    assert any("scaled_dot_product" in name for name in names)
    assert "aten::convolution (float32): 1" in str(found)
    assert not {"aten::relu", "aten::t", "aten::clone"} & names
    with audit() as found:
        F.linear(x, w)
    assert found.not_covered == {"aten::mm (bfloat16)": 1}
    with batch_invariant_mode(), audit() as found:
        F.linear(x.double(), w.double())
    assert "aten::mm (float64)" in found.not_covered
