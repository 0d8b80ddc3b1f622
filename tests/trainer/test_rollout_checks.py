"""Invalid rollouts and rewards raise an error at once, which names the response, the prompt and the token."""

import json
import re
from dataclasses import replace
from decimal import Decimal

import numpy as np
import pytest
import torch
from minirl.cli import main
from minirl.errors import MiniRLError
from minirl.models import make_model
from minirl.rollout import Rollouts, TransformersEngine
from minirl.sampling import make_sampler
from minirl.tasks import make_task
from minirl.train import Trainer

from minirl_kernels import RoutedExperts

NAN, INFINITY = float("nan"), float("inf")


@pytest.fixture
def sampler(config):
    """The sampler of a run with R3, whose rollouts have experts."""
    config = replace(config, routing_replay="R3")
    model, tokenizer = make_model(config)
    return make_sampler(config, model, tokenizer, make_task(config.task))


def sample(sampler, spoil):
    """Rewards of two responses to each of three prompts; `spoil` first changes the rollouts."""
    generate = type(sampler.engine).generate
    sampler.engine.generate = lambda prompts, n, seed: spoil(generate(sampler.engine, prompts, n, seed=seed))
    return sampler.sample(sampler.task.train[:3], 2, seed=0)


def with_value(name: str, value, row: int = 3, token: int | None = None):
    """Writes a value into a tensor of the rollouts, by default at the first token of the response."""

    def spoil(rollouts: Rollouts) -> Rollouts:
        tensor = getattr(rollouts, name).clone()
        tensor[row, first_token(rollouts, row) if token is None else token] = value
        return replace(rollouts, **{name: tensor})

    return spoil


def first_token(rollouts: Rollouts, row: int) -> int:
    return int(rollouts.response_mask[row].int().argmax())


def with_reason(reason):
    return lambda rollouts: replace(rollouts, finish_reasons=[*rollouts.finish_reasons[:-1], reason])


def ending_otherwise(rollouts):
    """The last response has the finish reason 'stop' without an end-of-sequence token."""
    ids = rollouts.token_ids.clone()
    ids[5, int(rollouts.attention_mask[5].sum()) - 1] = 5
    return with_reason("stop")(replace(rollouts, token_ids=ids))


def emptied(rollouts):
    """The fourth response has no tokens."""
    mask, sampled = rollouts.attention_mask.clone(), rollouts.response_mask.clone()
    mask[3], sampled[3] = mask[3] & ~sampled[3], False
    return replace(rollouts, attention_mask=mask, response_mask=sampled)


def with_experts(change):
    def spoil(rollouts):
        routed = rollouts.routed_experts
        return replace(rollouts, routed_experts=change(routed.experts.clone(), routed.valid, routed.num_experts))

    return spoil


def one_expert_too_many(experts, valid, num_experts):
    experts[3, 1, 1, 0] = num_experts
    return RoutedExperts(experts, valid, num_experts)


SPOILT = {
    "NaN log-prob": (with_value("rollout_log_probs", NAN), r"rollout_log_probs is nan at token \d+, token 0 of the"),
    "inf log-prob": (with_value("rollout_log_probs", INFINITY), "rollout_log_probs is inf"),
    "-inf log-prob": (with_value("rollout_log_probs", -INFINITY), "rollout_log_probs is -inf .* must be finite and at"),
    "probabilities": (with_value("rollout_log_probs", 0.25), r"rollout_log_probs is 0\.25"),
    "log-prob of the prompt": (with_value("rollout_log_probs", -1.0, token=0), "at token 0: it must be 0 where no tok"),
    "token beyond the vocabulary": (with_value("token_ids", 15), r"token \d+ is 15: it must be in \[0, 15\)"),
    "negative token": (with_value("token_ids", -100), r"is -100: it must be in \[0, 15\)"),
    "another prompt": (with_value("token_ids", 12, token=0), r"token 0 is 12: it must be \d+, the prompt's"),
    "hole in the mask": (with_value("response_mask", False), "response_mask is False at token"),
    "prompt in the mask": (with_value("response_mask", True, token=0), "response_mask is True at token 0"),
    "padding on the left": (with_value("attention_mask", False, token=0), "attention_mask is False at token 0"),
    "no token": (emptied, "a response must have at least one token"),
    "other group": (lambda rollouts: replace(rollouts, group_ids=torch.tensor([0, 0, 1, 0, 2, 2])), "group_ids is 0"),
    "stop without an end": (ending_otherwise, r"response 1 to prompt 2, .* its last token is 5: .* of \[1\]"),
    "unknown reason": (with_reason("abort"), r"response 1 to prompt 2, .* its finish reason is 'abort'"),
    "no reason": (with_reason(None), "its finish reason is None"),
    "expert out of range": (with_experts(one_expert_too_many), r"routed_experts is \[4, \d\] at token 1, MoE layer 1"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "message"), SPOILT.values(), ids=SPOILT)
def test_a_response_that_cannot_be_is_named(sampler, spoil, message):
    with pytest.raises(MiniRLError, match=message) as error:
        sample(sampler, spoil)
    problem = sampler.task.train[2 if "prompt 2" in message or "reason" in message else 1]
    assert f"prompt {sampler.task.train.index(problem)}, {problem.prompt!r}" in str(error.value)
    assert str(error.value).startswith("the rollout engine's answer cannot be used: response ")


def shaped(**fields):
    return lambda rollouts: replace(rollouts, **{name: change(rollouts) for name, change in fields.items()})


MISSHAPEN = {
    "five of six responses": (
        lambda rollouts: replace(
            rollouts,
            **{name: getattr(rollouts, name)[:5] for name in ("token_ids", "attention_mask", "response_mask")},
        ),
        "token_ids has shape .*, for 6 responses",
    ),
    "a mask of another length": (
        shaped(response_mask=lambda rollouts: rollouts.response_mask[:, :-1]),
        "response_mask has shape",
    ),
    "log-probs in 16 bits": (
        shaped(rollout_log_probs=lambda rollouts: rollouts.rollout_log_probs.bfloat16()),
        r"rollout_log_probs is torch\.bfloat16 on cpu: it must be torch\.float32",
    ),
    "a reason too few": (shaped(finish_reasons=lambda rollouts: rollouts.finish_reasons[:5]), "finish_reasons has 5"),
    "no experts": (shaped(routed_experts=lambda rollouts: None), "no routed_experts: routing_replay needs them"),
    "experts of one layer": (
        with_experts(lambda experts, valid, count: RoutedExperts(experts[:, :, :1], valid[:, :, :1], count)),
        r"routed_experts has shape \(6, \d+, 1, 2\): it must be \(6, \d+, 2, 2\)",
    ),
    "experts of another model": (
        with_experts(lambda experts, valid, count: RoutedExperts(experts, valid, 8)),
        "routed_experts is of 8 experts: it must be of 4",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), MISSHAPEN.values(), ids=MISSHAPEN)
def test_rollouts_of_another_shape_are_refused(sampler, spoil, message):
    with pytest.raises(MiniRLError, match=message):
        sample(sampler, spoil)


def test_more_tokens_than_were_asked_for(sampler):
    sampler.limits = replace(sampler.limits, max_new_tokens=2)
    with pytest.raises(MiniRLError, match="it must have at most 2, rollout"):
        sample(sampler, lambda rollouts: rollouts)


def test_log_probs_that_do_not_fit_their_tokens_are_not_padded():
    """A missing log-probability must not become 0, which would mean a probability of 1."""
    with pytest.raises(MiniRLError, match="has 1 log-probabilities for response 1 to prompt 0: it must have 2"):
        Rollouts.collate([[3]], [[4, 1], [4, 1]], [[-1.0, -2.0], [-1.0]], ["stop", "stop"], pad_token_id=0)
    with pytest.raises(MiniRLError, match="has 3 responses to 2 prompts: it must have as many to each"):
        Rollouts.collate([[3], [4]], [[1]] * 3, [[-1.0]] * 3, ["stop"] * 3, pad_token_id=0)


@pytest.mark.parametrize("reward", [1, -2.5, np.float32(0.5), np.int64(3), 1e30])
def test_rewards_that_are_numbers(sampler, reward):
    sampler.task.reward = lambda problem, response: reward
    _, rewards = sample(sampler, lambda rollouts: rollouts)
    assert torch.equal(rewards, torch.full((6,), float(reward)))


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (NAN, "is nan: it must be finite"),
        (-INFINITY, "is -inf: it must be finite"),
        (1e39, r"is 1e\+39: it must be finite in float32"),
        (None, "is None, a NoneType: it must be a float"),
        ("1.0", "is '1.0', a str: it must be a float"),
        (True, "is True, a bool: it must be a float"),
        (torch.tensor(1.0), r"is tensor\(1\.\), a Tensor: it must be a float"),
        ([1.0], r"is \[1\.0\], a list: it must be a float"),
        (Decimal(1), r"is Decimal\('1'\), a Decimal: it must be a float"),
    ],
)  # fmt: skip
def test_a_reward_that_is_no_number_is_named_with_its_response(sampler, reward, message):
    rewards = iter([0.0, 0.0, 0.0, reward])
    sampler.task.reward = lambda problem, response: next(rewards)
    prompt = re.escape(repr(sampler.task.train[1].prompt))
    with pytest.raises(
        MiniRLError, match=rf"reward of response 1 to prompt 1, {prompt}, whose text is '.*', {message}"
    ):
        sample(sampler, lambda rollouts: rollouts)


def test_a_reward_function_that_raises_is_told_with_its_error(sampler):
    sampler.task.reward = lambda problem, response: {}[problem]
    match = r"response 0 to prompt 0, .* cannot be computed: KeyError: Problem\(.*\) \(.*rollout_checks\.py, line \d+\)"
    with pytest.raises(MiniRLError, match=match) as error:
        sample(sampler, lambda rollouts: rollouts)
    assert isinstance(error.value.__cause__, KeyError)


def test_finished_steps_are_kept_when_an_engine_goes_wrong(config, config_file, capsys, monkeypatch):
    generate, step = TransformersEngine.generate, Trainer.step
    numbers = []

    def generating(self, prompts, n, *, seed):
        rollouts = generate(self, prompts, n, seed=seed)
        return with_value("rollout_log_probs", NAN)(rollouts) if numbers == [1, 2] else rollouts

    def stepping(self, number):
        numbers.append(number)
        return step(self, number)

    monkeypatch.setattr(TransformersEngine, "generate", generating)
    monkeypatch.setattr(Trainer, "step", stepping)
    with pytest.raises(SystemExit) as ended:
        main(["train", str(config_file())])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "response 3 to prompt 0, " in said
    assert "rollout_log_probs is nan at token" in said
    folder = config_file().parent / "run"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["phase"] == "train"] == [0, 1]
    assert (folder / "model" / "model.safetensors").is_file()
