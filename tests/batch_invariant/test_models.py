"""Whole models: the log-probability of a token has the same bits in decode, prefill, padded and packed batches."""

import pytest
import torch
from minirl.rollout.transformers import SampledLogProbs
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessorList, Qwen3Config, Qwen3MoeConfig

import minirl_kernels.integrations.transformers as integration
from minirl_kernels import batch_invariant_mode
from minirl_kernels.batch_invariant import audit

pytestmark = pytest.mark.usefixtures("cpu")
SEQUENCES, NEW_TOKENS, TEMPERATURE = 64, 20, 0.7
SIZES = {
    "vocab_size": 301,
    "hidden_size": 136,  # a multiple of some vector widths only
    "intermediate_size": 200,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
CONFIGS = {
    "Qwen3": Qwen3Config(**SIZES),
    "Qwen3-MoE": Qwen3MoeConfig(
        **SIZES, moe_intermediate_size=40, num_experts=8, num_experts_per_tok=3, norm_topk_prob=True
    ),
}


def make_model(name, ours=True):
    torch.manual_seed(0)
    implementation = "minirl" if ours else "sdpa"
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32, attn_implementation=implementation)
    if ours and name == "Qwen3-MoE":
        model.set_experts_implementation("minirl")
    return integration.enable_log_probs(model.eval())


def make_prompts():
    gen = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 30, (SEQUENCES,), generator=gen)
    return [torch.randint(2, SIZES["vocab_size"], (length,), generator=gen) for length in lengths]


def autocast(dtype):
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16")


@torch.no_grad()
def decode(model, prompts):
    """(responses, log-probabilities of their tokens): a prefill of prompts padded on the left, then token by token."""
    width = max(map(len, prompts))
    ids = torch.stack([torch.cat([prompt.new_zeros(width - len(prompt)), prompt]) for prompt in prompts])
    mask = torch.stack([torch.arange(width) >= width - len(prompt) for prompt in prompts]).long()
    sampled = SampledLogProbs(TEMPERATURE)
    torch.manual_seed(2)
    settings = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=NEW_TOKENS, pad_token_id=0, eos_token_id=[1])
    sequences = model.generate(
        ids, attention_mask=mask, logits_processor=LogitsProcessorList([sampled]), generation_config=settings
    )
    return sequences[:, width:], sampled.of(sequences[:, width:])


def targets(prompt, response):
    """(input_ids, token_ids) of a sequence whose response is scored."""
    ids = torch.cat([prompt, response])
    token_ids = ids.roll(-1)
    token_ids[: len(prompt) - 1] = -100
    token_ids[-1] = -100
    return ids, token_ids


def padded(model, rows, left):
    """Log-probabilities [T] of each row, all of them in one batch."""
    length = max(len(ids) for ids, _ in rows)

    def pad(values, fill):
        rest = values.new_full((length - len(values),), fill)
        return torch.cat([rest, values] if left else [values, rest])

    ids, token_ids = (torch.stack([pad(row[part], fill) for row in rows]) for part, fill in ((0, 0), (1, -100)))
    mask = torch.stack([pad(torch.ones_like(row), 0) for row, _ in rows])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    log_probs = model(
        ids, attention_mask=mask, position_ids=positions, token_ids=token_ids, temperature=TEMPERATURE, use_cache=False
    ).log_probs
    return [values[seen.bool()] for values, seen in zip(log_probs, mask, strict=True)]


def packed(model, rows):
    """Log-probabilities [T] of each row, all rows packed in a batch of one."""
    ids, token_ids = (torch.cat([row[part] for row in rows])[None] for part in (0, 1))
    positions = torch.cat([torch.arange(len(ids)) for ids, _ in rows])[None]
    log_probs = model(
        ids, position_ids=positions, token_ids=token_ids, temperature=TEMPERATURE, use_cache=False
    ).log_probs
    return log_probs[0].split([len(ids) for ids, _ in rows])


IN_TRAINING = "in training, padded on the right"
WAYS = {
    IN_TRAINING: lambda model, rows: padded(model, rows, left=False),
    "padded on the left": lambda model, rows: padded(model, rows, left=True),
    "packed": packed,
    "one sequence at a time": lambda model, rows: [padded(model, [row], left=False)[0] for row in rows],
    "in batches of seven, backwards": lambda model, rows: [
        values
        for start in range(0, len(rows), 7)
        for values in padded(model, rows[start : start + 7][::-1], left=False)[::-1]
    ],
}


def ways(model, dtype, names=tuple(WAYS)):
    """(log-probabilities [all tokens] of a decode, {way: the same of these responses} for each of the names)."""
    prompts = make_prompts()
    with autocast(dtype):
        responses, decoded = decode(model, prompts)
        rows = [targets(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        found = {name: WAYS[name](model, rows) for name in names}
    scored = [token_ids != -100 for _, token_ids in rows]
    found = {
        way: torch.cat([values[seen] for values, seen in zip(parts, scored, strict=True)])
        for way, parts in found.items()
    }
    return decoded.flatten(), found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_way_gives_the_same_bits(name, dtype, threads):
    model = make_model(name)
    threads(1)
    with batch_invariant_mode():
        decoded, found = ways(model, dtype)
    assert decoded.unique().numel() > SEQUENCES
    for way, values in found.items():
        assert torch.equal(values.detach(), decoded), way
    threads(2)
    with batch_invariant_mode():
        again, found = ways(model, dtype, [IN_TRAINING])
    assert torch.equal(again, decoded)
    assert torch.equal(found[IN_TRAINING].detach(), decoded)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_the_mode_they_differ(dtype):
    """Control: without this difference, the test above would prove nothing."""
    decoded, found = ways(make_model("Qwen3-MoE", ours=False), dtype)
    assert any(not torch.equal(values.detach(), decoded) for values in found.values())


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_uncovered_runs(name):
    """No uncovered operation runs, except sampling, and operations on the arguments of each forward alone."""
    model = make_model(name)
    with batch_invariant_mode(), audit() as found, autocast("bfloat16"):
        prompts = make_prompts()[:4]
        responses, _ = decode(model, prompts)
        rows = [targets(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        ids, token_ids = rows[0]
        model(ids[None], token_ids=token_ids[None], use_cache=False).log_probs.sum().backward()
    assert found.covered
    assert {call.split()[0] for call in found.not_covered} <= {"aten::multinomial", "aten::exponential_"}
