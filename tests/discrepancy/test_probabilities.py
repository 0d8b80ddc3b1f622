"""KL over the whole vocabulary and the metrics of sampled tokens, against their formulas in float64."""

import math

import numpy as np
import pytest
import torch
from minirl.config import RolloutConfig
from minirl.discrepancy.engines import inference_engine, training_engine
from minirl.discrepancy.settings import EngineSettings, InferenceSettings
from tiny_moe import COMMON
from transformers import Gemma2Config, Gemma2ForCausalLM
from two_engines import ENDS, PROMPTS, compared, model_of, planted, rounded

from minirl_kernels import PolicyLossConfig
from minirl_kernels.discrepancy import full_vocabulary_kl, sampled_token_metrics
from minirl_kernels.integrations.transformers import enable_log_probs


def logits_of(seed, rows=70, width=33, scale=3.0):
    return scale * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def kl_by_the_formula(mu_logits, pi_logits):
    out = []
    for mu_row, pi_row in zip(mu_logits.double().numpy(), pi_logits.double().numpy(), strict=True):
        mu, pi = (np.exp(row - row.max()) / np.exp(row - row.max()).sum() for row in (mu_row, pi_row))
        out.append(math.fsum(p * math.log(p / q) for p, q in zip(mu, pi, strict=True) if p > 0))
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_vocabulary_kl(dtype):
    mu, pi = logits_of(0).to(dtype), logits_of(1).to(dtype)
    mu[3, 5] = -math.inf
    torch.testing.assert_close(full_vocabulary_kl(mu, pi), kl_by_the_formula(mu, pi), rtol=1e-12, atol=1e-14)


def test_full_vocabulary_kl_at_its_ends():
    mu = logits_of(0)
    assert torch.equal(full_vocabulary_kl(mu, mu.clone()), torch.zeros(70, dtype=torch.float64))
    assert full_vocabulary_kl(mu[:0], mu[:0]).shape == (0,)
    ruled_out = mu.clone()
    ruled_out[2, 7] = -math.inf
    assert full_vocabulary_kl(mu, ruled_out)[2] == math.inf
    both = full_vocabulary_kl(ruled_out, ruled_out)
    assert both[2] == 0
    with pytest.raises(ValueError, match=r"mu_logits has shape \(70, 33\) and pi_logits \(70, 32\)"):
        full_vocabulary_kl(mu, mu[:, 1:])


def responses_of(seed, spread=0.5):
    generator = torch.Generator().manual_seed(seed)
    return [-spread * torch.rand(length, generator=generator) for length in (4, 1, 9, 30)]


def test_sampled_token_metrics():
    mu, old, current = responses_of(0, 3.0), responses_of(1, 3.0), responses_of(2, 3.0)
    config = PolicyLossConfig(clip_ratio_low=0.1, clip_ratio_high=0.3, rollout_is_threshold=2.0)
    found = sampled_token_metrics(mu, old, current, config)
    a, b, c = (torch.cat(values).double() for values in (mu, old, current))
    log_d, r, w = b - a, (c - b).exp(), (c - a).exp()
    expected = {
        "num_tokens": 44,
        "num_responses": 4,
        "discrepancy_kl_k1": -log_d.mean(),
        "discrepancy_kl_k3": (log_d.exp() - 1 - log_d).mean(),
        "log_d_abs_max": log_d.abs().max(),
        "staleness_kl_k1": -r.log().mean(),
        "clip_fraction_high": (r > 1.3).double().mean(),
        "clip_fraction_low": (r < 0.9).double().mean(),
        "truncation_fraction": (w > 2).double().mean(),
        "is_weight_max": w.max(),
        "ess": w.sum() ** 2 / (44 * w.square().sum()),
    }
    for key, value in expected.items():
        assert found[key] == pytest.approx(float(value), rel=1e-9), key
    assert 0 < found["clip_fraction_low"] < 1
    assert 0 < found["clip_fraction_high"] < 1
    assert 0 < found["truncation_fraction"] < 1
    for quantile, value in found["log_d_abs_quantiles"].items():
        assert value == pytest.approx(torch.quantile(log_d.abs(), float(quantile)).item())


def test_without_an_update_r_is_one():
    mu, old = responses_of(0), responses_of(1)
    old[2][3:6] = mu[2][3:6]
    found = sampled_token_metrics(mu, old)
    assert found["staleness_kl_k3"] == found["log_r_abs_max"] == found["clip_fraction_low"] == 0
    assert found["bit_equal_fraction"] == 3 / 44


def test_both_factors_of_eq_5():
    """With pi_old = mu only r remains, and with pi_theta = pi_old only d."""
    model = model_of("Qwen3Moe")
    update = planted(model, "lm_head.weight", lambda weight: 1.2 * weight)
    stale = compared(model, model, updated=update)
    assert stale.has_update
    assert stale.metrics["discrepancy_kl_k3"] == 0
    assert stale.metrics["staleness_kl_k3"] > 1e-3
    apart = compared(update, model, updated=model)
    assert apart.metrics["staleness_kl_k3"] == 0
    assert apart.metrics["discrepancy_kl_k3"] > 1e-3


def softcapped():
    torch.manual_seed(0)
    config = Gemma2Config(**{**COMMON, "head_dim": 8, "final_logit_softcapping": 0.5})
    return enable_log_probs(Gemma2ForCausalLM(config).eval())


@pytest.mark.parametrize("make", [lambda: model_of("Qwen3Moe"), softcapped], ids=["Qwen3Moe", "softcap"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engines_logits_are_those_of_its_log_probs(make, temperature, dtype):
    model = make()
    mu = inference_engine(
        model,
        InferenceSettings(dtype=dtype),
        RolloutConfig(max_new_tokens=5, temperature=temperature, batch_size=8),
        ENDS,
    )
    pi = training_engine(model, EngineSettings(dtype=dtype), temperature, "pi")
    responses, sampled = mu.generate(PROMPTS, seed=0)
    for scores in (sampled, pi.score(PROMPTS, responses, with_logits=True)):
        for response, log_probs, logits in zip(responses, scores.log_probs, scores.logits, strict=True):
            expected = logits.double().log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]
            torch.testing.assert_close(log_probs.double(), expected, rtol=0, atol=2e-6)
    assert pi.score(PROMPTS, responses, with_logits=False).logits is None


def test_batches_and_the_trace_do_not_change_what_is_said_of_tokens():
    model = model_of("Qwen3Moe")
    faulty = planted(model, "model.layers.1.self_attn.q_proj.weight", rounded)
    traced = compared(faulty, model)
    alone = compared(faulty, model, trace_sequences=0)
    assert traced.metrics == alone.metrics
    assert torch.equal(traced.log_d, alone.log_d)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": []}, "prompts is empty: it must hold at least one"),
        ({"prompts": [[5], []]}, r"prompts\[1\] is empty: it must have at least one token"),
        ({"batch_size": 0}, "batch_size is 0: it must be at least 1"),
        ({"trace_sequences": -1}, "trace_sequences is -1: it must be at least 0"),
    ],
)
def test_nonsense_is_refused(options, message):
    model = model_of("Qwen3Moe")
    with pytest.raises(ValueError, match=message):
        compared(model, model, **{"prompts": PROMPTS, **options})
