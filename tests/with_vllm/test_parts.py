"""The sampler alone, and unsupported models and processors that no setting names."""

from types import SimpleNamespace

import pytest
import torch

from minirl_kernels import token_logprobs

pytestmark = pytest.mark.usefixtures("cpu")
ROWS, VOCABULARY = 6, 301
TEMPERATURES = [0.7, 0.0, 1.3, 0.0, 0.2, 1.0]  # 0 means greedy sampling


@pytest.fixture
def logits():
    """Logits as a view, as vLLM makes them by removing the padding of its vocabulary."""
    return torch.randn(ROWS, 320, generator=torch.Generator().manual_seed(0))[:, :VOCABULARY] * 5


@pytest.fixture
def answer(logits):
    """The sampler's output for the logits, and the drawn ids."""
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.metadata import SamplingMetadata

    from minirl_kernels.integrations.vllm.sampler import TokenSampler

    def sample(mode="processed_logprobs", **changes):
        nothing = torch.zeros(ROWS)
        settings = {
            "temperature": torch.tensor(TEMPERATURES),
            "all_greedy": False,
            "all_random": False,
            "top_p": None,
            "top_k": None,
            "generators": {},
            "max_num_logprobs": 3,
            "no_penalties": True,
            "prompt_token_ids": None,
            "frequency_penalties": nothing,
            "presence_penalties": nothing,
            "repetition_penalties": nothing,
            "output_token_ids": [[] for _ in range(ROWS)],
            "allowed_token_ids_mask": None,
            "bad_words_token_ids": {},
            "logitsprocs": LogitsProcessors(),
        }
        output = TokenSampler(mode, False)(logits.clone(), SamplingMetadata(**{**settings, **changes}))
        return output.logprobs_tensors, output.sampled_token_ids[:, 0].long()

    return sample


def wanted(logits, ids, temperatures):
    """Expected log-probabilities [B, K], computed one id at a time."""
    temperatures = torch.tensor(temperatures)
    return torch.stack([token_logprobs(logits, column, temperature=temperatures) for column in ids.long().T], 1)


def test_the_likeliest_beside_the_drawn(answer, logits):
    found, sampled = answer()
    assert torch.equal(found.logprob_token_ids[:, 0].long(), sampled)
    assert torch.equal(found.logprob_token_ids[:, 1:].long(), logits.topk(3).indices)
    assert torch.equal(found.logprobs, wanted(logits, found.logprob_token_ids, [t or 1.0 for t in TEMPERATURES]))
    greedy = torch.tensor(TEMPERATURES) == 0
    assert torch.equal(sampled[greedy], logits[greedy].argmax(-1))
    assert torch.equal(found.selected_token_ranks, (logits >= logits.gather(1, sampled[:, None])).sum(1))


def test_all_greedy(answer, logits):
    found, sampled = answer(temperature=None, all_greedy=True)
    assert torch.equal(sampled, logits.argmax(-1))
    assert torch.equal(found.logprobs, wanted(logits, found.logprob_token_ids, [1.0] * ROWS))


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs"])
def test_tokens_that_were_named(mode, answer, logits):
    found, sampled = answer(mode, logprob_token_ids={0: [5, 9], 2: [300]}, max_num_logprobs=None)
    temperatures = [1.0 if mode == "raw_logprobs" else t or 1.0 for t in TEMPERATURES]
    named = torch.zeros(ROWS, 3, dtype=torch.long)
    named[:, 0], named[0, 1:], named[2, 1] = sampled, torch.tensor([5, 9]), 300
    values = wanted(logits, named, temperatures)
    values[[1, 2, 3, 4, 5], 2], values[[1, 3, 4, 5], 1] = -torch.inf, -torch.inf
    assert torch.equal(found.logprobs, values)


def test_logits_are_vllms_own(answer, logits):
    found, sampled = answer("raw_logits")
    assert torch.equal(found.logprobs[:, 0], logits.gather(1, sampled[:, None])[:, 0])


def test_a_processor_that_might_change_what_is_drawn_from(monkeypatch):
    from vllm.v1.worker.cpu_worker import CPUWorker

    from minirl_kernels.integrations.vllm.worker import BatchInvariantWorker

    processors = SimpleNamespace(argmax_invariant=[SimpleNamespace()])
    worker = object.__new__(BatchInvariantWorker)
    worker.model_runner = SimpleNamespace(input_batch=SimpleNamespace(logitsprocs=processors))
    monkeypatch.setattr(CPUWorker, "init_device", lambda self: None)
    with pytest.raises(ValueError, match="logits_processors has a SimpleNamespace: it must not have one that is"):
        worker.init_device()


def test_an_attention_that_is_not_plain():
    from minirl_kernels.integrations.vllm.attention import PagedAttentionImpl

    attention = object.__new__(PagedAttentionImpl)
    with pytest.raises(ValueError, match="sliding_window of an attention is 8: it must be None"):
        attention.__init__(4, 32, 0.2, 2, None, 8, "auto", None, "decoder", None)
