"""Rollouts follow the interface, and the code in docs/vllm.md runs."""

import re
from pathlib import Path

import pytest
import torch
from minirl.discrepancy.engines import training_engine
from minirl.discrepancy.settings import EngineSettings
from minirl.tokenizer import character_tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "vllm.md"
PROMPTS = [[5, 6, 7], [9] * 40, [3]]
N, END, LONGEST, TEMPERATURE = 24, 1, 30, 0.7


@pytest.fixture
def model(make_model):
    return make_model("Qwen3")


@pytest.fixture
def engine(model, make_engine):
    return make_engine(model, max_new_tokens=LONGEST, temperature=TEMPERATURE)


def test_rollouts(model, engine):
    """Responses are in the order of the prompts, with finish reasons and log-probabilities of the sampled tokens."""
    rollouts = engine.generate(PROMPTS, N, seed=0)
    assert rollouts.group_ids.tolist() == [group for group in range(3) for _ in range(N)]
    responses = rollouts.responses()
    prompts = [PROMPTS[group] for group in rollouts.group_ids]
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        assert rollouts.token_ids[row, rollouts.attention_mask[row]].tolist() == [*prompt, *response]
        assert END not in response[:-1]
        assert rollouts.finish_reasons[row] == ("stop" if response[-1] == END else "length")
        assert len(response) == LONGEST or response[-1] == END
    assert set(rollouts.finish_reasons) == {"stop", "length"}
    for group in range(3):
        assert len(set(map(tuple, responses[group * N : group * N + N]))) > N // 2  # different draws
    scores = training_engine(model, EngineSettings(), TEMPERATURE, "pi").score(prompts, responses, with_logits=False)
    found = rollouts.rollout_log_probs[rollouts.response_mask]
    torch.testing.assert_close(found, torch.cat(scores.log_probs), rtol=0, atol=1e-4)


def test_a_seed_fixes_the_samples_and_leaves_other_randomness_alone(engine):
    state = torch.get_rng_state()
    first, again, other = (engine.generate(PROMPTS, N, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.responses() == again.responses()
    assert first.responses() != other.responses()


def test_the_example_of_the_page(make_model, tmp_path, monkeypatch):
    """The example of the page, with weights that changed after vLLM loaded them."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    model = make_model("Qwen3-MoE")
    model.save_pretrained(tmp_path)
    character_tokenizer("0123456789").save_pretrained(tmp_path)
    with torch.no_grad():
        model.lm_head.weight.neg_()
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names = {"path": str(tmp_path), "prompts": ["1+1=", "23"], "seed": 0, "model": model}
    exec(code, names)
    try:
        for routed, output in zip(names["routed_experts"], names["outputs"], strict=True):
            assert len(routed.valid) == len(output.prompt_token_ids) + len(output.outputs[0].token_ids)
            assert routed.valid[:-1].all()
        assert not torch.equal(*map(first_log_prob, (names["outputs"], sampled_again(names))))
    finally:
        names["llm"].llm_engine.engine_core.shutdown()


def sampled_again(names):
    return names["llm"].generate(names["prompts"], names["SamplingParams"](logprobs=0, seed=names["seed"]))


def first_log_prob(outputs):
    return torch.tensor([next(iter(output.outputs[0].logprobs[0].values())).logprob for output in outputs])
