"""Scoring a batch padded on the left, as in the docs: position_ids are derived as `generate` does."""

import pytest
import torch
from causal_models import V, make

import minirl_kernels as mk
from minirl_kernels.integrations.transformers import enable_log_probs

pytestmark = pytest.mark.usefixtures("cpu")
NEW_TOKENS = 6


@pytest.fixture
def prompts():
    """(prompts [4, 5], mask) with 5, 2, 4 and 1 tokens."""
    prompts = torch.randint(3, V, (4, 5), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(5) >= torch.tensor([[0], [3], [1], [4]])).long()
    return prompts * mask, mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["gpt2", "qwen3", "qwen3_moe"])  # learned and rotary positions
def test_the_scoring_line_has_the_bits_of_generate(kind, dtype, prompts):
    prompts, mask = prompts
    model = enable_log_probs(make(kind).to(dtype))
    model.set_attn_implementation("minirl")
    if kind == "qwen3_moe":
        model.set_experts_implementation("minirl")
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    with torch.no_grad(), mk.batch_invariant_mode():
        torch.manual_seed(2)
        decode = model.generate(
            prompts, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **settings
        )
        sequences = decode.sequences
        sampled = mk.token_logprobs(torch.stack(decode.logits, 1), sequences[:, 5:])
        whole = torch.cat([mask, mask.new_ones(4, NEW_TOKENS)], 1)
        log_probs = model(sequences, attention_mask=whole, token_ids=sequences.roll(-1, 1)).log_probs
    assert log_probs.dtype == torch.float32
    assert torch.equal(log_probs[:, 4:-1], sampled)


@pytest.mark.parametrize("kind", ["gpt2", "opt", "qwen3", "qwen3_moe"])
def test_a_sequence_scores_the_same_behind_padding(kind, prompts):
    input_ids, mask = prompts
    model = enable_log_probs(make(kind))
    log_probs = model(input_ids, attention_mask=mask, token_ids=input_ids.roll(-1, 1)).log_probs
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = input_ids[row : row + 1, -length:]
        expected = model(alone, token_ids=alone.roll(-1, 1)).log_probs[0]
        torch.testing.assert_close(log_probs[row, -length:][:-1], expected[:-1])


@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_other_calls_get_the_positions_that_they_had(kind, prompts):
    """No mask, a mask of ones, padding on the right, given position_ids, and calls without token_ids."""
    input_ids, mask = prompts
    model = enable_log_probs(make(kind))
    seen = []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("position_ids")), with_kwargs=True
    )
    own = torch.arange(5)[None] + 3
    for attention_mask in (None, torch.ones_like(mask), mask.flip(1)):
        model(input_ids, attention_mask=attention_mask, token_ids=input_ids)
    model(input_ids, attention_mask=mask, position_ids=own, token_ids=input_ids)
    model(input_ids, attention_mask=mask)
    assert [None if positions is None else positions is own for positions in seen] == [None, None, None, True, None]


def test_compiled_with_every_mask(prompts):
    input_ids, mask = prompts
    model = enable_log_probs(make("gpt2", n_layer=1))
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for attention_mask in (mask, mask.flip(1), torch.ones_like(mask)):
        arguments = {"attention_mask": attention_mask, "token_ids": input_ids.roll(-1, 1), "use_cache": False}
        expected = model(input_ids, **arguments).log_probs
        is_token = attention_mask.bool()
        torch.testing.assert_close(compiled(input_ids, **arguments).log_probs[is_token], expected[is_token])
    torch.compiler.reset()
