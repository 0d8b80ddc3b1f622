"""The kernels over tokens of the losses in Triton's interpreter: inputs, token losses, metrics and sums."""

import math
from dataclasses import replace

import pytest
import torch
import triton_cases
from own_objectives import EXAMPLES, Squared, SquaredOfResponse
from policy_batches import LENGTHS, PRESETS, TOKEN_LEVEL, batch_at_bounds, every_config, random_batch

from minirl_kernels import Correction, PolicyLossConfig, fused_policy_loss, policy_loss
from minirl_kernels.objectives import DPPO
from minirl_kernels.ops.policy_loss import op
from minirl_kernels.ops.policy_loss.inputs import prepare_inputs, prepare_rows
from minirl_kernels.ops.policy_loss.metric_table import COUNTS, MAXIMA, METRICS, SUMS, Count
from minirl_kernels.ops.policy_loss.op import differentiable_loss

pytestmark = triton_cases.interpreter_only()

LAYOUTS = pytest.mark.parametrize("layout", ["padded", "packed"])
LONG = [1500, 0, 1024, 3, 2100]
MODES = {
    "seq-mean-token-sum": {},
    "seq-mean-token-mean": {},
    "seq-mean-token-sum-norm": {"loss_scale_factor": 7.0},
    "token-mean": {},
    "group-token-mean": {},
}
COUNTS_GIVEN = ("num_responses", "num_tokens", "num_groups")
PER_TOKEN = ("weights", "old_log_probs", "rollout_log_probs", "ref_log_probs", "advantages")


def inputs_of(batch, layout, config, backend, **changes):
    """The inputs of a call that checks no values, as on a GPU."""
    arguments = dict.fromkeys((*COUNTS_GIVEN, "cu_seqlens")) | batch.arguments(layout) | changes
    shape = batch.lay_out(batch.log_probs, layout).shape
    return prepare_inputs(shape, torch.device("cpu"), raises=False, backend=backend, config=config, **arguments)


def loss_of(batch, layout, config, backend, with_entropy=True, **changes):
    """(output, gradient of the log-probabilities) of policy_loss."""
    inputs = inputs_of(batch, layout, config, backend, **changes)
    leaf, entropy = (batch.lay_out(values, layout) for values in (batch.log_probs, batch.entropy))
    leaf = leaf.clone().requires_grad_()
    entropy = entropy if with_entropy else None
    out = differentiable_loss(leaf, entropy, inputs, entropy)
    return out, torch.autograd.grad(out.loss, leaf)[0]


def name_of(entry):
    """The metric that a count, a sum or a maximum belongs to."""
    for metric in METRICS:
        if entry in (metric.count, metric.maximum) or getattr(entry, "value", None) in metric.sums:
            return f"{metric.name} ({entry})"
    raise AssertionError(entry)


def assert_same_metrics(ours, theirs):
    """Each row of the kernels is its entry in metric_table.py."""
    for values, expected, entries in (
        (ours.sums, theirs.sums, (*COUNTS, *SUMS)),
        (ours.maxima, theirs.maxima, MAXIMA),
    ):
        assert len(values) == len(entries), "kernels_metrics.py must have a row for each entry of metric_table.py"
        for entry, value, right in zip(entries, values, expected, strict=True):
            torch.testing.assert_close(
                value, right, rtol=1e-10, atol=1e-12, equal_nan=True, msg=lambda m, e=entry: f"{name_of(e)}: {m}"
            )


def assert_same(ours, theirs):
    """Outputs of the kernels and of torch, which both compute in float64 and round once."""
    for name in ("log_probs", "entropy"):
        assert torch.equal(getattr(ours[0], name), getattr(theirs[0], name))
    for a, b in ((ours[1], theirs[1]), *((getattr(o[0], n), getattr(t[0], n)) for o, t in [(ours, theirs)]
                 for n in ("token_loss", "token_grad"))):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, equal_nan=True)
    scale = theirs[0].token_loss.abs().sum().item()
    torch.testing.assert_close(ours[0].loss, theirs[0].loss, rtol=0, atol=1e-6 * scale, equal_nan=True)
    assert_same_metrics(ours[0].metrics, theirs[0].metrics)


@LAYOUTS
@pytest.mark.parametrize("spread", [0.05, 1.5])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_metric_and_loss_is_its_definition(preset, spread, layout):
    for config in every_config(kl_coef=0.1, entropy_coef=0.01, loss_agg_mode="seq-mean-token-sum"):
        if config.objective == preset:
            batch = random_batch(LENGTHS, spread=spread)
            assert_same(*(loss_of(batch, layout, config, backend) for backend in ("triton", "reference")))


@pytest.mark.parametrize(
    "options",
    [
        {"rollout_is": Correction(level="sequence", upper=1.5, beyond="mask_response"), "rollout_is_threshold": None},
        {"rollout_is": Correction(upper=1.2)},
        {"kl_coef": 0.5, "kl_estimator": "k1"},
        {"kl_coef": 0.5, "kl_estimator": "k2"},
    ],
    ids=str,
)
def test_corrections_and_estimators(options):
    batch = random_batch(LENGTHS, spread=0.5)
    config = PolicyLossConfig(**options)
    assert_same(*(loss_of(batch, "packed", config, backend) for backend in ("triton", "reference")))


CORRECTIONS = [
    Correction(lower=0.8, upper=1.3, beyond="mask_token"),
    Correction(upper=1.5, beyond="mask_response", normalise=True),
    Correction(level="sequence", lower=0.5, upper=1.5, normalise=True),
    Correction(level="sequence_mean", lower=0.9, upper=1.1, beyond="mask_response", weighs=False),
    "sequence",
    "token",
]


@pytest.mark.parametrize("number", range(len(CORRECTIONS)))
@pytest.mark.parametrize(
    "objective",
    ["minirl", "gspo", *EXAMPLES.values(), Squared(), SquaredOfResponse()],
    ids=str,
)
def test_every_objective_with_every_correction(objective, number):
    """The objectives of the library, objectives as a user writes them, and a GPU's weights of whole responses."""
    if isinstance(objective, DPPO) and CORRECTIONS[number] != "token":
        return  # it has no other correction
    config = PolicyLossConfig.preset(
        objective, rollout_is=CORRECTIONS[number], rollout_is_threshold=None, kl_coef=0.1, entropy_coef=0.01
    )
    batch = random_batch([5, 1, 4, 9], spread=0.5)
    layout = ("padded", "packed")[number % 2]
    assert_same(*(loss_of(batch, layout, config, backend) for backend in ("triton", "reference")))


@pytest.mark.parametrize("preset", TOKEN_LEVEL)
def test_either_side_of_every_bound(preset):
    config = PolicyLossConfig.preset(preset, rollout_is="token", rollout_is_threshold=5.0, loss_agg_mode="token-mean")
    batch = batch_at_bounds(config)
    assert_same(*(loss_of(batch, "packed", config, backend) for backend in ("triton", "reference")))


@LAYOUTS
@pytest.mark.parametrize("left_out", ["old_log_probs", "rollout_log_probs", "ref_log_probs", "entropy", "loss_mask"])
def test_what_is_not_given_is_not_counted(left_out, layout):
    batch = random_batch(LENGTHS)
    config = PolicyLossConfig(rollout_is=None)
    changes = {} if left_out == "entropy" else {left_out: None}
    if left_out == "loss_mask" and layout == "padded":
        return  # the padding holds poison
    runs = [
        loss_of(batch, layout, config, backend, left_out != "entropy", **changes) for backend in ("triton", "reference")
    ]
    assert_same_metrics(*(out.metrics for out, _ in runs))
    assert runs[0][0].metrics.compute().keys() == runs[1][0].metrics.compute().keys()


@LAYOUTS
def test_responses_of_several_blocks(layout):
    batch = random_batch(LONG, spread=0.02)
    config = PolicyLossConfig.grpo(kl_coef=0.1, loss_agg_mode="token-mean")
    assert_same(*(loss_of(batch, layout, config, backend) for backend in ("triton", "reference")))


def test_a_ratio_of_a_long_response_does_not_depend_on_its_place():
    """GSPO's ratio of a response of several blocks, beside other responses and alone."""
    batch = random_batch([700, 1, 1500], spread=0.02)
    config = PolicyLossConfig.gspo(rollout_is="sequence")
    together, _ = loss_of(batch, "packed", config, "triton", num_responses=3)
    alone, _ = loss_of(batch.responses(2, 3), "packed", config, "triton", num_responses=3)
    assert torch.equal(alone.token_loss, together.token_loss[701:])
    assert torch.equal(alone.token_grad, together.token_grad[701:])


def test_the_sum_over_a_response_does_not_depend_on_its_place():
    """A response adds in the order of its own tokens, wherever it lies in the packed batch."""
    batch = random_batch([1500, 700, 2100], spread=0.3)
    of_last = torch.arange(4300) >= 2200
    config = PolicyLossConfig(clip=False)
    together, _ = loss_of(
        replace(batch, loss_mask=of_last), "packed", config, "triton", num_responses=3, loss_mask=of_last
    )
    alone = replace(batch.responses(2, 3), loss_mask=of_last[2200:])
    out, _ = loss_of(alone, "packed", config, "triton", num_responses=3)
    assert torch.equal(out.loss, together.loss)
    assert out.metrics.maxima.tolist() == together.metrics.maxima.tolist()
    per_token = [
        i
        for i, entry in enumerate((*COUNTS, *SUMS))
        if (entry if isinstance(entry, Count) else entry.count).per == "token"
    ]
    assert torch.equal(out.metrics.sums[per_token], together.metrics.sums[per_token])


def prepared(batch, layout, config, backend, **changes):
    arguments = dict.fromkeys((*COUNTS_GIVEN, "cu_seqlens")) | batch.arguments(layout) | changes
    ids = batch.lay_out(torch.arange(sum(batch.lengths)).masked_fill(torch.arange(sum(batch.lengths)) % 5 == 0, -100),
                        layout)  # fmt: skip
    return prepare_rows(ids.shape, ids.device, token_ids=ids, raises=False, backend=backend, config=config, **arguments)


@pytest.mark.parametrize(("lengths", "layout"), [(LENGTHS, "padded"), (LENGTHS, "packed"), (LONG, "packed")], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_inputs_have_the_bits_of_torch(mode, lengths, layout):
    check_inputs(mode, None, lengths, layout)


@pytest.mark.parametrize("count", [12.5, torch.tensor(7), torch.tensor([3.0]), torch.tensor(0)], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_a_count_of_the_caller(mode, count):
    check_inputs(mode, count, LENGTHS, "packed")


def check_inputs(mode, count, lengths, layout):
    """The kernels make the same mask, weights and values as torch, bit for bit."""
    batch = random_batch(lengths)
    config = PolicyLossConfig(loss_agg_mode=mode, **MODES[mode])
    changes = dict.fromkeys(COUNTS_GIVEN, count)
    (ours, ids), (theirs, expected_ids) = (
        prepared(batch, layout, config, backend, **changes) for backend in ("triton", "reference")
    )
    assert torch.equal(ids, expected_ids)
    assert torch.equal(ours.mask, theirs.mask)
    for name in PER_TOKEN:
        a, b = (getattr(inputs, name).where(theirs.mask, 0.0) for inputs in (ours, theirs))
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        assert getattr(ours, name).is_contiguous()
    if layout == "packed":
        assert torch.equal(ours.layout.offsets, theirs.layout.offsets)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_arguments_of_any_dtype_and_strides(dtype):
    """Values as a slice of whole sequences, in the dtype of the model, and a mask of integers."""
    batch = random_batch(LENGTHS)
    arguments = batch.arguments("padded")
    sliced = {}
    for name, values in arguments.items():
        if values.dim() == 2:
            values = values.to(torch.int32 if name == "loss_mask" else dtype)
            values = torch.nn.functional.pad(values, (1, 2))[:, 1:-2]
            assert not values.is_contiguous()
        sliced[name] = values
    sliced["advantages"] = sliced["advantages"][:, None].expand(-1, sliced["loss_mask"].shape[1])
    config = PolicyLossConfig.grpo(kl_coef=0.1)
    runs = [loss_of(batch, "padded", config, backend, **sliced) for backend in ("triton", "reference")]
    assert_same(*runs)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["old_log_probs", "rollout_log_probs", "ref_log_probs", "advantages"])
@pytest.mark.parametrize("preset", ["minirl", "gspo"])
def test_an_argument_that_is_not_finite_is_nan_in_its_tokens_results(preset, name, wrong):
    batch = random_batch(LENGTHS)
    batch = replace(batch, advantages=batch.token_advantages(), loss_mask=torch.ones_like(batch.loss_mask))
    getattr(batch, name)[12] = wrong
    config = PolicyLossConfig.preset(preset, kl_coef=0.1, loss_agg_mode="seq-mean-token-sum")
    ours, theirs = (loss_of(batch, "packed", config, backend) for backend in ("triton", "reference"))
    assert torch.equal(ours[1].isnan(), theirs[1].isnan())
    assert ours[1][12].isnan()
    assert ours[0].loss.isnan()
    overflows = [out.metrics.compute()["num_overflow_tokens"] for out, _ in (ours, theirs)]
    assert overflows[0] == overflows[1] > 0


@pytest.mark.parametrize("offsets", [[0, 3, 2, 5], [1, 2, 3, 5], [0, 2, 3, 4], [0, 2, 3, 900]], ids=str)
def test_offsets_that_are_no_offsets(offsets):
    batch = random_batch([2, 1, 2], vocab_size=7)
    arguments = {**batch.arguments("packed"), "cu_seqlens": torch.tensor(offsets, dtype=torch.int32)}
    with pytest.raises(ValueError, match=rf"cu_seqlens is \[{offsets[0]}, .*it must start at 0, never fall"):
        fused_policy_loss(batch.logits, batch.token_ids, backend="triton", **arguments)


@LAYOUTS
@pytest.mark.parametrize("lengths", [[], [0, 0]], ids=str)
def test_no_tokens(lengths, layout):
    batch = random_batch(lengths)
    out, grad = loss_of(batch, layout, PolicyLossConfig(), "triton")
    assert out.loss == 0
    assert not grad.any()
    assert out.metrics.compute() == {"num_tokens": 0, "num_responses": len(lengths)}


def test_policy_loss_on_a_gpu_takes_the_kernels(monkeypatch):
    """The public call, with the backend that it has on a GPU; values and the gradient of 16-bit log-probabilities."""
    batch = random_batch(LENGTHS)
    config = PolicyLossConfig(entropy_coef=0.1)

    def run():
        leaves = [values.bfloat16().requires_grad_() for values in (batch.log_probs, batch.entropy)]
        out = policy_loss(leaves[0], entropy=leaves[1], config=config, **batch.arguments("packed"))
        return out, torch.autograd.grad(3 * out.loss, leaves)

    expected, expected_grads = run()
    monkeypatch.setattr(op, "backend_of", lambda device: "triton")
    out, grads = run()
    for a, b in zip(grads, expected_grads, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a, b, rtol=2**-7, atol=0)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=1e-6)
    assert_same_metrics(out.metrics, expected.metrics)


def test_compiled_whole():
    batch = random_batch(LENGTHS, vocab_size=20)
    compiled = torch.compile(fused_policy_loss, fullgraph=True, backend="aot_eager")
    for config in (PolicyLossConfig(entropy_coef=0.1), PolicyLossConfig.cispo(), PolicyLossConfig.gspo()):
        for layout in ("padded", "packed"):
            results = []
            for call in (fused_policy_loss, compiled):
                leaf = batch.lay_out(batch.logits, layout).clone().requires_grad_()
                ids = batch.lay_out(batch.token_ids, layout)
                out = call(leaf, ids, config=config, backend="triton", **batch.arguments(layout))
                results.append((out.loss, out.metrics.sums, torch.autograd.grad(out.loss, leaf)[0]))
            assert all(map(torch.equal, *results))
    torch.compiler.reset()
