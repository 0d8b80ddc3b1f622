"""The experts chosen by vLLM are the experts that the training engine would choose."""

import pytest
import torch

from minirl_kernels import RoutedExperts, record_routing
from minirl_kernels.moe.routers import routers

BLOCK = 32  # tokens in a cache block, the minimum of vLLM's kernels
NEAR_TIE = 1e-4  # gap between the K-th and the next logit; 100 times the float32 difference of the engines


def prompts():
    """200 prompts of mixed lengths; most share a prefix of whole blocks and of parts of blocks."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda count: torch.randint(2, 64, (count,), generator=generator).tolist()  # noqa: E731
    prefixes = [draw(length) for length in (0, 10, BLOCK, BLOCK + 9, 2 * BLOCK, 3 * BLOCK + 1)]
    return [prefixes[number % 6] + draw(1 + number % 40) for number in range(200)]


@torch.no_grad()
def natural(model, rollouts):
    """(the training engine's own experts, whether a token is far from a tie in each layer [B, L, layers])."""
    found = routers(model)
    logits = []
    handles = [
        router.modules[0].register_forward_hook(lambda module, args, out: logits.append(out[0])) for router in found
    ]
    with record_routing(model) as record:
        model(rollouts.token_ids, attention_mask=rollouts.attention_mask)
    for handle in handles:
        handle.remove()
    top = torch.stack(logits, 1).topk(found[0].top_k + 1).values
    clear = top[..., -2] - top[..., -1] > NEAR_TIE
    return record.sequences(len(rollouts.token_ids)), clear.unflatten(0, rollouts.token_ids.shape)


def assert_as_trained(model, rollouts):
    own, clear = natural(model, rollouts)
    replayed = rollouts.routed_experts
    computed = rollouts.attention_mask.clone()
    computed[torch.arange(len(computed)), computed.sum(1) - 1] = False  # the last token was sampled but never computed
    assert torch.equal(replayed.valid, computed[..., None].expand_as(replayed.valid))
    compared = clear & replayed.valid
    assert compared.sum() > 0.99 * replayed.valid.sum()
    same = (replayed.experts.sort(-1).values == own.experts.sort(-1).values).all(-1)
    assert same[compared].all()


@pytest.mark.parametrize("tokens", [200, 8192])
def test_two_hundred_requests(make_model, make_engine, tokens):
    """With chunks of 200 tokens, cache hits, and preemptions (few blocks); and with all prompts in one step."""
    model = make_model("Qwen3-MoE")
    args = {
        "max_num_batched_tokens": tokens,
        "block_size": BLOCK,
        "disable_log_stats": False,
        "num_gpu_blocks_override": 80,
    }
    engine = make_engine(model, records_routing=True, max_new_tokens=40, batch_size=200, args=args)
    rollouts = engine.generate(prompts(), 1, seed=0)
    assert_as_trained(model, rollouts)
    counted = {metric.name: getattr(metric, "value", 0) for metric in engine._llm.get_metrics()}
    assert counted["vllm:prefix_cache_hits"] > 0
    assert counted["vllm:num_preemptions"] > 0


def test_new_weights_and_old_requests(make_model, make_engine):
    """Experts in the cache from earlier weights are not returned for new requests."""
    model = make_model("Qwen3-MoE")
    engine = make_engine(model, records_routing=True, max_new_tokens=4, args={"block_size": BLOCK})
    shared = prompts()[4::6]
    engine.generate(shared, 2, seed=0)
    with torch.no_grad():
        for router in routers(model):
            weight = router.modules[0].weight
            weight.copy_(weight.flip(0))
    engine.update_weights(model)
    assert_as_trained(model, engine.generate(shared, 2, seed=0))


def test_what_was_never_computed_is_missing(make_model, make_engine):
    model = make_model("Qwen3-MoE")
    engine = make_engine(model, records_routing=True, max_new_tokens=4, args={"block_size": BLOCK})
    engine.generate([[5] * 2 * BLOCK], 1, seed=0)
    engine._client._llm.collective_rpc("forget_routing")  # as if recording had begun after this request
    rollouts = engine.generate([[5] * 2 * BLOCK + [6]], 1, seed=0)
    found: RoutedExperts = rollouts.routed_experts
    assert not found.valid[0, : 2 * BLOCK].any()
    assert found.valid[0, 2 * BLOCK : -1].all()
