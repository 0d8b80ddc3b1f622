"""The embedded engine: its log-probabilities equal the model's log-probabilities of the sampled tokens."""

from dataclasses import replace

import pytest
import torch
from minirl.errors import MiniRLError
from minirl.models import end_token_ids, make_model
from minirl.rollout import Rollouts, TransformersEngine
from transformers import GPT2Config, GPT2LMHeadModel

from minirl_kernels.integrations.transformers.e4m3 import E4M3Copy

PROMPTS = [[4], [5, 6, 13], [3, 4, 5, 6, 7, 8], [9, 10]]


@pytest.fixture
def model(config):
    return make_model(config)[0]


@pytest.fixture
def make_engine(config, model):
    def make(**changes) -> TransformersEngine:
        # makes the end token likely, so that responses end early and at different places
        engine = TransformersEngine(
            replace(config.rollout, **changes), dtype=config.dtype, pad_token_id=0, eos_token_ids=[1, 7, 8]
        )
        engine.update_weights(model)
        return engine

    return make


@torch.no_grad()
def teacher_forced(model, rollouts: Rollouts, temperature: float) -> torch.Tensor:
    """Log-probability of each response token, from each row alone and without padding; 0 for other tokens."""
    values = torch.zeros(rollouts.token_ids.shape)
    for row in range(len(values)):
        ids = rollouts.token_ids[row][rollouts.attention_mask[row]]
        log_probs = (model(ids[None]).logits[0].double() / temperature).log_softmax(-1)
        for place in range(1, len(ids)):
            values[row, place] = log_probs[place - 1, ids[place]]
    return torch.where(rollouts.response_mask, values, 0.0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("batch_size", [4, 16, 64])
def test_log_probs_are_those_of_the_decode(make_engine, model, temperature, batch_size):
    rollouts = make_engine(temperature=temperature, batch_size=batch_size).generate(PROMPTS, 4, seed=0)
    expected = teacher_forced(model, rollouts, temperature)
    torch.testing.assert_close(rollouts.rollout_log_probs, expected, rtol=0, atol=2e-5)
    lengths = rollouts.response_mask.sum(1)
    assert lengths.min() < 6
    assert set(rollouts.finish_reasons) == {"stop", "length"}


def test_responses_end_with_the_first_end_token(make_engine):
    rollouts = make_engine().generate(PROMPTS, 8, seed=0)
    for response, reason in zip(rollouts.responses(), rollouts.finish_reasons, strict=True):
        ends = [token in (1, 7, 8) for token in response]
        assert not any(ends[:-1])
        assert ends[-1] == (reason == "stop")
        assert reason == "stop" or len(response) == 6


def test_prompts_come_back_in_order(make_engine):
    rollouts = make_engine().generate(PROMPTS, 3, seed=0)
    assert rollouts.group_ids.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    for row, group in enumerate(rollouts.group_ids):
        length = int((rollouts.attention_mask[row] & ~rollouts.response_mask[row]).sum())
        assert rollouts.token_ids[row, :length].tolist() == PROMPTS[group]


def test_seed_fixes_the_samples_and_leaves_other_randomness_alone(make_engine):
    engine = make_engine()
    torch.manual_seed(3)
    expected = torch.rand(())
    torch.manual_seed(3)
    first, again, other = (engine.generate(PROMPTS, 4, seed=seed) for seed in (5, 5, 6))
    assert torch.rand(()) == expected
    assert torch.equal(first.token_ids, again.token_ids)
    assert torch.equal(first.rollout_log_probs, again.rollout_log_probs)
    assert first.responses() != other.responses()


def test_filters_of_the_models_own_are_not_used(make_engine, model):
    expected = make_engine().generate(PROMPTS, 4, seed=0)
    model.generation_config.update(top_k=1, repetition_penalty=3.0, temperature=0.1, min_new_tokens=5)
    filtered = make_engine().generate(PROMPTS, 4, seed=0)
    assert filtered.responses() == expected.responses()
    assert model.generation_config.top_k == 1  # the training model keeps its generation config


def test_new_weights_are_sampled_from(make_engine, model):
    engine = make_engine()
    before = engine.generate(PROMPTS, 4, seed=0)
    with torch.no_grad():
        model.lm_head.weight.neg_()
    engine.update_weights(model)
    after = engine.generate(PROMPTS, 4, seed=0)
    assert after.responses() != before.responses()
    torch.testing.assert_close(after.rollout_log_probs, teacher_forced(model, after, 1.0), rtol=0, atol=2e-5)


def test_every_end_token_counts(config):
    model, tokenizer = make_model(config)
    assert end_token_ids(model, tokenizer) == [tokenizer.eos_token_id]
    model.generation_config.eos_token_id = [9, tokenizer.eos_token_id]
    assert end_token_ids(model, tokenizer) == sorted([9, tokenizer.eos_token_id])


def test_logits_are_what_the_tokens_were_drawn_from(config, model):
    engine = TransformersEngine(
        replace(config.rollout, temperature=0.7),
        dtype="float32",
        pad_token_id=0,
        eos_token_ids=[1, 7, 8],
        keeps_logits=True,
    )
    engine.update_weights(model)
    rollouts = engine.generate(PROMPTS, 4, seed=0)
    for logits, ids, values, mask in zip(
        rollouts.logits, rollouts.token_ids, rollouts.rollout_log_probs, rollouts.response_mask, strict=True
    ):
        expected = logits.double().log_softmax(-1).gather(1, ids[mask][:, None])[:, 0]
        torch.testing.assert_close(values[mask].double(), expected, rtol=0, atol=1e-6)


def test_logits_are_not_kept_unasked(make_engine):
    assert make_engine().generate(PROMPTS, 4, seed=0).logits is None


def test_quantized_rollouts_are_those_of_the_copy_and_follow_the_weights(make_engine, model):
    plain, engine = make_engine(), make_engine(quantization="e4m3")
    for _ in range(2):
        rollouts = engine.generate(PROMPTS, 4, seed=0)
        copied = E4M3Copy(model).model
        expected = teacher_forced(copied, rollouts, 1.0)
        torch.testing.assert_close(rollouts.rollout_log_probs, expected, rtol=0, atol=2e-5)
        distance = (rollouts.rollout_log_probs - teacher_forced(model, rollouts, 1.0)).abs().max()
        assert distance > 1e-3, "nothing was rounded"
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1.3)
        engine.update_weights(model)
    plain.update_weights(model)
    rollouts = plain.generate(PROMPTS, 4, seed=0)
    torch.testing.assert_close(rollouts.rollout_log_probs, teacher_forced(model, rollouts, 1.0), rtol=0, atol=2e-5)


def test_quantized_rollouts_record_their_routing(config, model):
    engine = TransformersEngine(
        replace(config.rollout, quantization="e4m3"),
        dtype="float32",
        pad_token_id=0,
        eos_token_ids=[1],
        records_routing=True,
    )
    engine.update_weights(model)
    rollouts = engine.generate(PROMPTS, 2, seed=0)
    assert rollouts.routed_experts.num_missing(rollouts.attention_mask) == len(rollouts.token_ids)


def test_a_model_that_cannot_be_quantized(config):
    engine = TransformersEngine(
        replace(config.rollout, quantization="e4m3"), dtype="float32", pad_token_id=0, eos_token_ids=[1]
    )
    with pytest.raises(MiniRLError, match=r"rollout.quantization is 'e4m3': it must be none, as a GPT2LMHeadModel"):
        engine.update_weights(GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=1)))
