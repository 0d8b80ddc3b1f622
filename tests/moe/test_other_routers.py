"""record_routing and replay_routing on models whose routers take a bias, return scores or hold a linear layer."""

from unittest import mock

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

import transformers
from policy_batches import SLACK
from tiny_moe import COMMON, OTHER_ROUTERS, gate_weights, random_experts, tiny, token_ids

from minirl_kernels import record_routing, replay_routing


def loss_and_gradients(model, ids):
    model.zero_grad()
    loss = torch.log_softmax(model(ids).logits.float(), -1).gather(-1, ids.roll(-1, 1)[..., None]).mean()
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def choosing(experts):
    """Replaces torch.topk, through which these routers choose, so that it returns the given experts."""
    layers = iter(experts.long().unbind(1))

    def topk(scores, k, dim=-1, sorted=True):
        ids = next(layers)
        assert ids.shape == (len(scores), k)
        values = scores.gather(1, ids)
        return torch.return_types.topk((values, ids))

    return mock.patch("torch.topk", topk)


@pytest.mark.parametrize("name", OTHER_ROUTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_replay_of_a_record_under_the_same_weights_changes_no_bit(name, dtype):
    model, ids = tiny(name).to(dtype), token_ids()
    with torch.no_grad():
        plain = model(ids).logits
    with record_routing(model) as record:
        natural = loss_and_gradients(model, ids)
    with replay_routing(model, record.routed_experts) as replay:
        replayed = loss_and_gradients(model, ids)
    assert torch.equal(natural[0], replayed[0])
    assert all(torch.equal(one, other) for one, other in zip(natural[1], replayed[1], strict=True))
    assert bool((replay.agreement == 1).all())
    with torch.no_grad(), record_routing(model):
        logits = model(ids).logits
    if dtype == torch.float32:  # in bfloat16 transformers breaks ties differently
        assert (logits - plain).abs().max() <= 4 * SLACK * plain.abs().max()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain)


@pytest.mark.parametrize("name", OTHER_ROUTERS)
def test_replay_is_what_the_model_computes_when_it_chooses_these_experts(name):
    model, ids = tiny(name), token_ids()
    routed = random_experts(model, ids.numel())
    with choosing(routed.experts):
        expected = loss_and_gradients(model, ids)
    gate_grads = [weight.grad for weight in gate_weights(model)]
    assert all(bool((grad != 0).any()) for grad in gate_grads)
    with replay_routing(model, routed) as replay:
        replayed = loss_and_gradients(model, ids)
    assert replay.agreement.mean() < 1
    torch.testing.assert_close(replayed[0], expected[0], rtol=1e-6, atol=1e-7)
    for mine, its in zip(replayed[1], expected[1], strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-6)


def test_a_sparse_mixer_is_refused_by_name():
    """Phi-MoE samples its experts in training and has its own rule for weights, so it cannot be replayed."""
    config = transformers.PhimoeConfig(**COMMON, num_local_experts=8, num_experts_per_tok=2)
    model = transformers.PhimoeForCausalLM(config)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp .*router \(PhimoeTopKRouter\)"), record_routing(model):
        pass


def test_attention_that_has_experts_is_refused_by_name():
    config = transformers.JetMoeConfig(**COMMON, kv_channels=8, num_local_experts=4, num_experts_per_tok=2)
    model = transformers.JetMoeForCausalLM(config)
    with pytest.raises(ValueError, match=r"experts in model\.layers\.0\.self_attention \(JetMoeAttention\)"):
        record_routing(model).__enter__()
