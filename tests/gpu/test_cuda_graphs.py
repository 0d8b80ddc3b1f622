"""A CUDA graph of a call, replayed with new data, has the bits of the call itself."""

import pytest
import torch
from cuda_graphs import captured
from graph_cases import graph_cases

from minirl_kernels import batch_invariant_mode


@pytest.mark.parametrize("enabled", [False, True], ids=["stock", "in the mode"])
@pytest.mark.parametrize("name", graph_cases("cpu"))
def test_replays_with_new_data(name, enabled):
    case = graph_cases("cuda")[name]
    with batch_invariant_mode(enabled):
        inputs = case.make(0)
        graph, results = captured(lambda: case.run(inputs), warm_ups=2)
        for seed in (1, 2):
            fresh = case.make(seed)
            expected = case.run({name: x.clone() for name, x in fresh.items()})
            with torch.no_grad():
                for name, x in fresh.items():
                    inputs[name].copy_(x)
            graph.replay()
            torch.cuda.synchronize()
            for actual, right in zip(results, expected, strict=True):
                assert torch.equal(actual, right)


def test_a_decode_step_in_the_mode():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    import minirl_kernels.integrations.transformers  # noqa: F401  registers the attention

    sizes = {"vocab_size": 65, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = transformers.Qwen3Config(**sizes, **heads, initializer_range=0.3, max_position_embeddings=64)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="minirl").eval()
    prompt = torch.randint(65, (3, 7), device="cuda")
    steps = torch.randint(65, (6, 3, 1), device="cuda")

    def prefilled():
        cache = transformers.StaticCache(config=config, max_cache_len=32)
        model(prompt, past_key_values=cache)
        return cache

    def decoded(cache, ids, position):
        return model(ids, position_ids=position, past_key_values=cache).logits

    with batch_invariant_mode(), torch.no_grad():
        cache = prefilled()
        expected = [decoded(cache, ids, torch.full((3, 1), 7 + i, device="cuda")) for i, ids in enumerate(steps)]
        cache = prefilled()
        ids, position = steps[0].clone(), torch.full((3, 1), 7, device="cuda")
        # a step advances the cache, and a replay advances it too: the warm-ups and the capture repeat the first steps
        graph, logits = captured(lambda: decoded(cache, ids, position))
        cache.reset()
        model(prompt, past_key_values=cache)
        for i, step in enumerate(steps):
            ids.copy_(step)
            position.fill_(7 + i)
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(logits, expected[i])
