"""Every metric against a plain loop, and the metrics of a whole batch from the metrics of its parts."""

import math
import re
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from policy_batches import batch_at_bounds, random_batch
from ranks import run_ranks
from two_ranks import LENGTHS, metrics_of, reduce_a_part

from minirl_kernels import PolicyLossConfig, PolicyLossMetrics, policy_loss
from minirl_kernels.ops.policy_loss.metric_table import METRICS

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"


def by_loop(batch, low=0.8, high=1.27, threshold=5.0):
    """MiniRL's metrics, token by token in Python floats."""
    advantages = batch.token_advantages().tolist()
    log_r, log_d, log_w, entropies, above, below, log_k, errors = ([] for _ in range(8))
    for start, end in batch.spans():
        response = []
        for t in range(start, end):
            if not batch.loss_mask[t]:
                continue
            pi, old, mu, ref = (
                values[t].item()
                for values in (batch.log_probs, batch.old_log_probs, batch.rollout_log_probs, batch.ref_log_probs)
            )
            log_r.append(pi - old)
            log_d.append(old - mu)
            response.append(pi - mu)
            log_k.append(ref - pi)
            entropies.append(batch.entropy[t].item())
            above.append(advantages[t] > 0 and math.exp(pi - old) > high)
            below.append(advantages[t] < 0 and math.exp(pi - old) < low)
        errors.append(abs(math.expm1(math.fsum(response)) - math.fsum(math.expm1(x) for x in response)))
        log_w += response
    mean = statistics.fmean
    w = [math.exp(x) for x in log_w]
    return {
        "num_tokens": len(log_r),
        "num_overflow_tokens": 0,
        "num_responses": len(batch.lengths),
        "staleness_kl_k1": -mean(log_r),
        "staleness_kl_k3": mean(math.exp(x) - 1 - x for x in log_r),
        "log_r_abs_max": max(map(abs, log_r)),
        "clip_fraction_high": mean(above),
        "clip_fraction_low": mean(below),
        "truncation_fraction": mean(x > threshold for x in w),
        "entropy": mean(entropies),
        "kl_ref": mean(math.exp(x) - 1 - x for x in log_k),
        "discrepancy_kl_k1": -mean(log_d),
        "discrepancy_kl_k3": mean(math.exp(x) - 1 - x for x in log_d),
        "log_d_abs_max": max(map(abs, log_d)),
        "is_weight_mean": mean(w),
        "is_weight_max": max(w),
        "ess": sum(w) ** 2 / (len(w) * sum(x * x for x in w)),
        "first_order_error_mean": mean(errors),
        "first_order_error_max": max(errors),
    }


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("spread", [1e-3, 0.3, 1.5])
def test_every_number_against_a_loop(spread, layout):
    batch = random_batch(LENGTHS, spread=spread)
    expected = by_loop(batch)
    computed = metrics_of(batch, layout=layout).compute()
    assert computed.keys() == expected.keys()
    assert computed == pytest.approx(expected, rel=1e-9, abs=1e-15)
    if spread > 1:  # only then are the fractions above 0
        assert min(expected[name] for name in ("clip_fraction_high", "clip_fraction_low", "truncation_fraction")) > 0


@pytest.mark.parametrize(
    ("config", "high", "low", "truncated"),
    [
        # of the five ratios of batch_at_bounds one is above and one below; one of three advantages has the sign that
        # counts
        (PolicyLossConfig(), 1 / 15, 1 / 15, None),
        (PolicyLossConfig(clip=False), 0, 0, None),
        (PolicyLossConfig.grpo(), 1 / 15, 1 / 15, 0),
        (PolicyLossConfig.gspo(), 1 / 15, 1 / 15, 0),
        (PolicyLossConfig.cispo(), 1 / 5, 1 / 5, 0),  # for any sign of the advantage
        (PolicyLossConfig(rollout_is_threshold=None), 1 / 15, 1 / 15, 0),
    ],
)
def test_fractions_by_objective(config, high, low, truncated):
    batch = batch_at_bounds(config)
    computed = metrics_of(batch, config).compute()
    assert computed["clip_fraction_high"] == pytest.approx(high)
    assert computed["clip_fraction_low"] == pytest.approx(low)
    if truncated is None:
        w = (batch.log_probs.double() - batch.rollout_log_probs.double()).exp()
        truncated = (w > 5).double().mean().item()
        assert 0.2 < truncated < 0.8
    assert computed["truncation_fraction"] == truncated


def test_truncation_of_a_correction_is_of_d():
    config = PolicyLossConfig.grpo(rollout_is="token", rollout_is_threshold=5.0)
    batch = random_batch(LENGTHS, spread=1.5)
    d, w = (
        (above.double() - batch.rollout_log_probs.double())[batch.loss_mask].exp()
        for above in (batch.old_log_probs, batch.log_probs)
    )
    fraction = metrics_of(batch, config).compute()["truncation_fraction"]
    assert fraction == (d > 5).double().mean()
    assert fraction != (w > 5).double().mean()


def test_on_policy_the_staleness_is_exactly_zero():
    batch = random_batch(LENGTHS)
    for old in (None, batch.log_probs):
        computed = metrics_of(replace(batch, old_log_probs=old)).compute()
        for name in ("log_r_abs_max", "staleness_kl_k1", "staleness_kl_k3", "clip_fraction_high", "clip_fraction_low"):
            assert computed[name] == 0
        assert computed["log_d_abs_max"] > 0


def test_engines_that_agree_have_no_discrepancy():
    batch = random_batch(LENGTHS)
    computed = metrics_of(replace(batch, rollout_log_probs=batch.log_probs, old_log_probs=None)).compute()
    expected = {"discrepancy_kl_k1": 0, "discrepancy_kl_k3": 0, "log_d_abs_max": 0, "is_weight_mean": 1}
    expected |= {"is_weight_max": 1, "ess": 1, "first_order_error_mean": 0, "first_order_error_max": 0}
    assert {name: computed[name] for name in expected} == pytest.approx(expected, rel=1e-12)


def test_what_was_not_given_is_left_out():
    batch = random_batch(LENGTHS)
    config = PolicyLossConfig(rollout_is=None)
    everything = metrics_of(batch, config).compute()
    of_rollout = {name for name in everything if name.startswith(("discrepancy", "is_weight", "first_order"))}
    of_rollout |= {"log_d_abs_max", "ess"}
    for argument, names in (("rollout_log_probs", of_rollout), ("ref_log_probs", {"kl_ref"}), ("entropy", {"entropy"})):
        without = metrics_of(batch, config, **{argument: None}).compute()
        assert without == {name: value for name, value in everything.items() if name not in names}


def test_parts_add_up_to_the_whole():
    batch = random_batch(LENGTHS)
    first, second = (metrics_of(batch.responses(*part)) for part in ((0, 2), (2, 6)))
    assert (first + second).compute() == pytest.approx(metrics_of(batch).compute(), rel=1e-12)
    assert (first + second).compute() == (second + first).compute()


def test_no_tokens():
    empty = metrics_of(random_batch([]))
    assert empty.compute() == {"num_tokens": 0, "num_responses": 0}
    some = metrics_of(random_batch(LENGTHS))
    assert (empty + some).compute() == some.compute()


def test_they_are_tensors_without_gradient():
    """Before compute(), no metric waits for the device or keeps a graph alive."""
    batch = random_batch(LENGTHS)
    metrics = policy_loss(
        batch.log_probs.clone().requires_grad_(), entropy=batch.entropy.requires_grad_(), **batch.arguments("packed")
    ).metrics
    for values in (metrics.sums, metrics.maxima):
        assert values.dtype == torch.float64
        assert not values.requires_grad


def test_all_reduce_over_two_processes(tmp_path):
    run_ranks(reduce_a_part, tmp_path, tmp_path)
    whole = metrics_of(random_batch(LENGTHS)).compute()
    for rank in range(2):
        reduced = PolicyLossMetrics(**torch.load(tmp_path / f"{rank}.pt"))
        assert reduced.compute() == pytest.approx(whole, rel=1e-12)


def test_the_documented_metrics_are_those_that_are_computed():
    documented = re.findall(r"^\| `(\w+)` \| (.+) \|$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    assert documented == [(metric.name, metric.doc) for metric in METRICS]
    assert [name for name, _ in documented] == list(metrics_of(random_batch(LENGTHS)).compute())
