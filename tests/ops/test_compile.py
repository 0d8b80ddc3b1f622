"""opcheck for every registered op, and torch.compile(fullgraph=True) around every public call.

Most tests use aot_eager. It traces, functionalises and partitions as Inductor does, without a C++ compiler.
"""

import runpy
from pathlib import Path

import pytest
import torch
from policy_batches import PRESETS, random_batch

from minirl_kernels import (
    PolicyLossConfig,
    attention,
    bmm,
    fused_policy_loss,
    group_advantages,
    linear,
    matmul,
    moe_experts,
    moe_routing,
    policy_loss,
    token_logprobs,
)

LENGTHS = [5, 1, 4, 9]

pytestmark = pytest.mark.usefixtures("cpu")


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def op_arguments():
    """Arguments for the CPU kernels of every op, by its name, with and without each argument that may be None."""
    arguments = loss_arguments()
    for path in Path(__file__).parent.glob("*_opcheck.py"):
        arguments.update(runpy.run_path(str(path))["op_arguments"]())
    return arguments


def loss_arguments():
    """Arguments for the ops of losses and checks; <op>_opcheck.py has the arguments of the other ops."""
    rows = (2, 3)
    logits, ids = torch.randn(*rows, 7), torch.randint(7, rows)
    ones, none = torch.ones(rows), None
    of_backward = (ids, ones, ones, ones, ones, ones)
    spans = torch.tensor([[0, 0, 2, 0, 5], [0, 3, 3, 5, 4]])
    objective = ("minirl", True, 0.8, 1.27, 5.0)
    of_loss = [
        (ids, ones, -ones, -ones, -ones, ones, ones, *objective, 0.1, "k3", 0.1, "cpu"),
        (ids.int(), ones, none, none, none, ones, ones, *objective, 0.0, "k1", 0.0, "cpu"),
    ]
    # a set for each token: the token and one more
    sets = (
        ids.flatten()[:, None].add(torch.tensor([0, 1])).remainder(7).sort().values.int().flatten(),
        torch.arange(7).int() * 2,
    )
    # the head of a linear loss with flat rows, with and without bias and softcap; then the gradients that are needed
    hidden, weight, flat_ids, flat = torch.randn(6, 5), torch.randn(7, 5), ids.flatten(), torch.ones(6)
    heads = [
        (hidden, weight, torch.randn(7), flat_ids, flat, 3.0, *sets),
        (hidden.bfloat16(), weight.bfloat16(), none, flat_ids.int(), flat, 0.0, none, none),
    ]
    needs = [(True, True, True), (True, False, False)]
    of_linear_loss = [
        (flat, -flat, -flat, flat, flat, *objective, 0.1, "k3", 0.1),
        (none, none, none, flat, flat, *objective, 0.0, "k1", 0.0),
    ]
    return {
        "checked_kept": [(ids, *sets, torch.tensor(7))],
        "kept_logits": [(logits, *sets, "cpu"), (logits.bfloat16().transpose(0, 1), *sets, "cpu")],
        "kept_logits_": [(logits, *sets, "cpu"), (logits.bfloat16(), *sets, "cpu")],
        "linear_token_logprobs": [(*heads[0], True, "cpu"), (*heads[1], False, "cpu")],
        "linear_token_logprobs_backward": [
            (*heads[0], flat, flat, flat, flat, flat, *needs[0], "cpu"),
            (*heads[1], flat, flat, flat, flat, none, *needs[1], "cpu"),
        ],
        "fused_linear_policy_loss": [
            (*head, *loss, *which, None, "cpu") for head, loss, which in zip(heads, of_linear_loss, needs, strict=True)
        ],
        # ops that are registered by the import of the integration with transformers
        "checked_mask": [(torch.tensor([True]), spans, "nothing is wrong")],
        "checked_window": [(spans, 6)],
        "refuse_restarts": [(torch.arange(6).view(2, 3), "nothing")],
        "checked_token_ids": [(ids, torch.tensor(7), ones)],
        "finite_per_token": [(torch.ones(()).expand(2, 3), ids >= 0, torch.tensor([0, 3, 6]), "old_log_probs")],
        "checked_count": [(torch.tensor(2.0), ids >= 0, "num_tokens")],
        "checked_losses": [
            (ones.sum(), ones, ones, ones, ones.double(), ones.double(), log_ref, ones, torch.tensor([0, 3, 6]))
            for log_ref in (none, ones.double())
        ],
        "checked_offsets": [(torch.tensor([0, 2, 6]), 6), (torch.tensor([0, 6], dtype=torch.int32), 6)],
        "group_advantages": [(torch.rand(4), torch.tensor([0, 1, 0, 1]), False)],
        "token_logprobs": [(logits, ids, ones, with_entropy, "cpu") for with_entropy in (True, False)],
        "token_logprobs_backward": [(logits, *of_backward, grad_entropy, "cpu") for grad_entropy in (ones, none)],
        "token_logprobs_backward_": [(logits, *of_backward, grad_entropy, "cpu") for grad_entropy in (ones, none)],
        "fused_policy_loss": [(logits.bfloat16(), *arguments) for arguments in of_loss],
        "fused_policy_loss_": [(logits.bfloat16(), torch.tensor([0, 3, 6]), *arguments) for arguments in of_loss],
    }


def registered_ops():
    return [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("minirl_kernels::")]


@pytest.mark.parametrize("name", sorted(registered_ops()))
def test_opcheck(name):
    """Schema, fake, autograd registration and AOTAutograd are right. An op without arguments above fails here."""
    name = name.removeprefix("minirl_kernels::")
    for arguments in op_arguments()[name]:
        torch.library.opcheck(getattr(torch.ops.minirl_kernels, name).default, arguments)


def fused(batch, layout, **options):
    """A function of logits to be compiled. The logits have a history, so that their gradient is compiled too."""
    arguments, ids = batch.arguments(layout), batch.lay_out(batch.token_ids, layout)

    def call(logits):
        return fused_policy_loss(logits * 1, ids, **arguments, **options)

    return call


def run(call, leaf, factor=1.0):
    leaf = leaf.clone().requires_grad_()
    out = call(leaf)
    return out, *torch.autograd.grad(factor * out.loss, leaf)


def assert_same(actual, expected):
    """Results and gradients are equal bit for bit."""
    (out, grad), (expected_out, expected_grad) = actual, expected
    for name in ("loss", "log_probs", "entropy", "token_loss", "token_grad"):
        ours, theirs = getattr(out, name), getattr(expected_out, name)
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs), name
    assert torch.equal(grad, expected_grad)
    if out.metrics is not None:
        assert out.metrics.compute() == expected_out.metrics.compute()


@pytest.mark.parametrize(("layout", "overwrite"), [("padded", False), ("packed", True)])
@pytest.mark.parametrize("preset", PRESETS)
def test_fused_policy_loss(preset, layout, overwrite, cpu):
    batch = random_batch(LENGTHS, vocab_size=21)
    config = PolicyLossConfig.preset(preset, kl_coef=0.1, entropy_coef=0.1)
    call = fused(batch, layout, config=config, overwrite_logits=overwrite, backend=cpu)
    leaf = batch.lay_out(batch.logits, layout)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_same(run(compiled, leaf, factor=-2.0), run(call, leaf, factor=-2.0))


def test_fused_policy_loss_under_inductor(cpu):
    """Float arguments keep their dtype: a temperature or bound in float64 would change the bits of the results."""
    batch = random_batch(LENGTHS, vocab_size=21)
    config = PolicyLossConfig(kl_coef=0.1, entropy_coef=0.1, loss_agg_mode="token-mean")
    arguments, ids = batch.arguments("packed"), batch.token_ids

    def call(logits, temperature, num_tokens):
        out = fused_policy_loss(
            logits * 1,
            ids,
            temperature=temperature,
            num_tokens=num_tokens,
            config=config,
            overwrite_logits=True,
            backend=cpu,
            **arguments,
        )
        return out._replace(metrics=None)  # compiled in the tests above; slow under Inductor

    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for step in range(3):
        numbers = (0.7 + 0.1 * step, 10 + step)
        assert_same(*(run(lambda leaf, f=f: f(leaf, *numbers), batch.logits, factor=1.5) for f in (compiled, call)))  # noqa: B023
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 1, "compiled anew for a number"


def test_second_backward_under_inductor(cpu):
    """The compiler keeps the gradient for a second backward, so it must not be scaled in place by the first one."""
    batch = random_batch(LENGTHS, vocab_size=21)
    call = fused(batch, "padded", config=PolicyLossConfig.gspo(), overwrite_logits=True, backend=cpu)
    leaf = batch.lay_out(batch.logits, "padded").requires_grad_()
    scaled = 2 * torch.compile(lambda logits: call(logits).loss, fullgraph=True)(leaf)
    first = torch.autograd.grad(scaled, leaf, retain_graph=True)[0].clone()
    second = torch.autograd.grad(scaled, leaf, retain_graph=True)[0]
    assert torch.equal(first, second)
    expected = torch.autograd.grad(2 * call(leaf).loss, leaf)[0]
    torch.testing.assert_close(first, expected, rtol=1e-6, atol=1e-8)


def test_reference():
    batch = random_batch(LENGTHS, vocab_size=21)
    call = fused(batch, "packed", config=PolicyLossConfig.grpo(kl_coef=0.1), backend="reference")
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_same(run(compiled, batch.logits), run(call, batch.logits))


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("preset", PRESETS)
def test_policy_loss(preset, layout):
    batch = random_batch(LENGTHS)
    config = PolicyLossConfig.preset(preset, kl_coef=0.1, entropy_coef=0.1)
    arguments, entropy = batch.arguments(layout), batch.lay_out(batch.entropy, layout)

    def call(log_probs):
        return policy_loss(log_probs, entropy=entropy, config=config, **arguments)

    leaf = batch.lay_out(batch.log_probs, layout)
    assert_same(run(torch.compile(call, fullgraph=True, backend="aot_eager"), leaf), run(call, leaf))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_token_logprobs(compiler, cpu):
    batch = random_batch(LENGTHS, vocab_size=21, dtype=torch.bfloat16)
    temperature = torch.linspace(0.5, 2, sum(LENGTHS))

    def call(logits):
        log_probs, entropy = token_logprobs(
            logits, batch.token_ids, temperature=temperature, with_entropy=True, backend=cpu
        )
        return log_probs, entropy, 2 * log_probs.sum() - entropy.sum()

    results = []
    for f in (torch.compile(call, fullgraph=True, backend=compiler), call):
        leaf = batch.logits.clone().requires_grad_()
        *values, total = f(leaf)
        results.append((*values, *torch.autograd.grad(total, leaf)))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_moe_routing(compiler, cpu):
    """Weights, diagnostics and gradient are equal. Invalid replayed experts raise when compiled code runs."""
    logits, bias = torch.randn(7, 24).bfloat16(), torch.randn(24)
    experts = torch.rand(7, 24).argsort(-1)[:, :3].to(torch.uint8)
    options = {"scoring": "sigmoid", "correction_bias": bias, "num_groups": 4, "top_k_groups": 2, "scale": 2.5}

    def call(logits, experts, scale):
        replayed = moe_routing(logits, 3, routed_experts=experts, scale=scale, backend=cpu)
        natural = moe_routing(logits, 3, **options, backend=cpu)
        total = (replayed.weights * natural.weights).sum()
        return total, *replayed, *natural

    compiled = torch.compile(call, fullgraph=True, backend=compiler)
    results = []
    for f in (compiled, call):
        leaf = logits.clone().requires_grad_()
        total, *values = f(leaf, experts, 1.5)
        results.append((*values, *torch.autograd.grad(total, leaf)))
    assert all(map(torch.equal, *results))
    wrong = experts.clone()
    wrong[5, 1] = 24
    with pytest.raises(ValueError, match="routed_experts has the expert 24 at row 5"):
        compiled(logits, wrong, 1.5)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_attention(compiler, cpu):
    """Invalid offsets raise when compiled code runs."""
    torch.manual_seed(0)
    operands = [torch.randn(7, 4, 8), torch.randn(9, 2, 8), torch.randn(9, 2, 8)]
    offsets = torch.tensor([0, 3, 7], dtype=torch.int32), torch.tensor([0, 5, 9], dtype=torch.int32)

    def call(q, k, v, cu_seqlens_q, cu_seqlens_k):
        return attention(q * 2, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, scale=0.3, backend=cpu)

    compiled = torch.compile(call, fullgraph=True, backend=compiler)
    results = []
    for f in (compiled, call):
        leaves = [leaf.clone().requires_grad_() for leaf in operands]
        out = f(*leaves, *offsets)
        results.append((out, *torch.autograd.grad(out, leaves, torch.ones_like(out))))
    assert all(map(torch.equal, *results))
    with torch.no_grad():
        assert torch.equal(compiled(*operands, *offsets), results[1][0])
    with pytest.raises(ValueError, match=r"cu_seqlens_q is \[0, 3, 8\]"):
        compiled(*operands, torch.tensor([0, 3, 8], dtype=torch.int32), offsets[1])


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_moe_experts(compiler, cpu):
    """From the router's logits on. An expert out of range raises when compiled code runs."""
    torch.manual_seed(0)
    operands = [torch.randn(7, 12), torch.randn(7, 4), torch.randn(4, 20, 12), torch.randn(4, 12, 10)]

    def call(hidden, logits, gate_up, down, experts):
        routing = moe_routing(logits, 2, backend=cpu)
        chosen = routing.experts if experts is None else experts
        return moe_experts(hidden, (routing.weights, chosen), gate_up, down, backend=cpu)

    compiled = torch.compile(call, fullgraph=True, backend=compiler)
    results = []
    for f in (compiled, call):
        leaves = [leaf.clone().requires_grad_() for leaf in operands]
        out = f(*leaves, None)
        results.append((out, *torch.autograd.grad(out, leaves, torch.ones_like(out))))
    assert all(map(torch.equal, *results))
    with torch.no_grad():
        assert torch.equal(compiled(*operands, None), results[1][0])
    with pytest.raises(ValueError, match=r"routing\.experts has the expert 4 at row 5"):
        compiled(*operands, torch.tensor([[0, 1]] * 5 + [[2, 4]] + [[0, 1]]))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_products(compiler, cpu):
    """linear, matmul and bmm, with and without a bias, on rows that do not form one contiguous matrix."""
    torch.manual_seed(0)
    operands = [torch.randn(2, 7, 12)[:, 1:5], torch.randn(9, 12), torch.randn(9)]

    def call(x, weight, bias):
        y = linear(x, weight, bias, backend=cpu)
        return matmul(linear(y[0], weight.T, backend=cpu), weight.T, backend=cpu) + bmm(y, y.mT, backend=cpu).sum()

    results = []
    for f in (torch.compile(call, fullgraph=True, backend=compiler), call):
        leaves = [leaf.detach().requires_grad_() for leaf in operands]
        out = f(*leaves)
        results.append((out, *torch.autograd.grad(out, leaves, torch.ones_like(out))))
    torch.testing.assert_close(*results)


def test_group_advantages():
    rewards, group_ids = torch.tensor([1.0, 0.0, 0.1, 0.1]), torch.tensor([0, 0, 1, 1])
    compiled = torch.compile(group_advantages, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(rewards, group_ids), group_advantages(rewards, group_ids))
    with pytest.raises(ValueError, match="group_ids has one response in group 2"):
        compiled(rewards, torch.tensor([0, 0, 0, 2]))


def test_shapes_may_change(cpu):
    """One graph serves all shapes."""
    batch = random_batch([9] * 6, vocab_size=21)
    arguments = batch.arguments("packed")
    per_token = {name: values for name, values in arguments.items() if len(values) == 54}

    def call(logits, ids, cu_seqlens, advantages, per_token):
        return fused_policy_loss(
            logits * 1,
            ids,
            cu_seqlens=cu_seqlens,
            advantages=advantages,
            overwrite_logits=True,
            backend=cpu,
            **per_token,
        )

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for responses in (6, 4, 5, 3):
        tokens = 9 * responses
        rest = (
            batch.token_ids[:tokens].clone(),
            arguments["cu_seqlens"][: responses + 1].clone(),
            batch.advantages[:responses].clone(),
            {name: values[:tokens].clone() for name, values in per_token.items()},
        )
        assert_same(*(run(lambda leaf, f=f: f(leaf, *rest), batch.logits[:tokens]) for f in (compiled, call)))  # noqa: B023
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 1


@pytest.mark.parametrize("preset", ["minirl", "gspo"])
def test_logits_from_outside_are_overwritten(preset, cpu):
    """The logits hold the gradient afterwards, keep their own history, and count the change in their version."""
    batch = random_batch(LENGTHS, vocab_size=21)
    arguments = batch.arguments("packed")

    def call(logits):
        config = PolicyLossConfig.preset(preset)
        return fused_policy_loss(
            logits, batch.token_ids, config=config, overwrite_logits=True, backend=cpu, **arguments
        ).loss

    results = []
    for f in (torch.compile(call, fullgraph=True, backend="aot_eager"), call):
        leaf = batch.logits.clone().requires_grad_()
        logits = leaf * 3
        history, version = logits.grad_fn, logits._version
        z_loss = logits.square().sum()  # saves the logits
        loss = f(logits)
        assert logits.grad_fn is history
        assert logits._version > version
        written = logits.detach().clone()
        (grad,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            z_loss.backward()
        results.append((loss, written, grad))
    assert all(map(torch.equal, *results))
    assert torch.equal(results[0][1] * 3, results[0][2])


def test_contents_are_checked_when_compiled_code_runs(cpu):
    """An invalid id, temperature or offset in a later call raises at that call."""
    batch = random_batch(LENGTHS, vocab_size=21)
    arguments = batch.arguments("packed")

    def call(ids, temperature, cu_seqlens, check):
        return fused_policy_loss(
            batch.logits,
            ids,
            temperature=temperature,
            check=check,
            backend=cpu,
            **{**arguments, "loss_mask": None, "cu_seqlens": cu_seqlens},
        ).loss

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    good = (batch.token_ids, torch.ones(sum(LENGTHS)), arguments["cu_seqlens"])
    bad_ids, bad_temperature, bad_offsets = (values.clone() for values in good)
    bad_ids[3], bad_temperature[3], bad_offsets[-1] = 21, 0.0, 10**6
    for check in (False, True):
        compiled(*good, check)
        with pytest.raises(ValueError, match="token_ids has the id 21 at row 3"):
            compiled(bad_ids, *good[1:], check)
        with pytest.raises(ValueError, match=r"cu_seqlens is .*1000000"):
            compiled(*good[:2], bad_offsets, check)
    with pytest.raises(ValueError, match=r"temperature has the value 0\.0"):
        compiled(good[0], bad_temperature, good[2], True)
