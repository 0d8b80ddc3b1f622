"""vLLM computes with the weights that it received after each step."""

import pytest
import torch
from minirl.discrepancy.engines import scores_of, training_engine
from minirl.discrepancy.settings import EngineSettings
from minirl.errors import MiniRLError
from safetensors.torch import save_file

WEIGHTS = "minirl_kernels.integrations.vllm.weights"
PROMPTS = [[2 + (7 * row + place) % 60 for place in range(3 + row % 9)] for row in range(16)]


def perturb(model, seed):
    """Changes weights but keeps their size, so that the discrepancy of bfloat16 stays the same."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_((weight + 0.3 * weight.std() * noise) / 1.09**0.5 if weight.dim() > 1 else 1 + 0.1 * noise)


@pytest.mark.parametrize("kind", ["Qwen3", "Qwen3-MoE"])
def test_twenty_in_a_row(make_model, make_engine, kind):
    model = make_model(kind)
    perturb(model, 0)
    engine = make_engine(model, dtype="bfloat16", max_new_tokens=12)
    trainer = training_engine(model, EngineSettings(dtype="bfloat16"), 1.0, "pi")

    def discrepancy(seed):
        rollouts = engine.generate(PROMPTS, 8, seed=seed)
        prompts = [PROMPTS[group] for group in rollouts.group_ids]
        scores = trainer.score(prompts, rollouts.responses(), with_logits=False)
        return (torch.cat(scores.log_probs) - torch.cat(scores_of(rollouts).log_probs)).abs()

    before = discrepancy(0)
    for number in range(1, 21):
        perturb(model, number)
        stale = discrepancy(number)
        engine.update_weights(model)
        after = discrepancy(number)
        assert stale.mean() > 10 * before.mean()  # old weights would not pass
        # other weights and samples, so only approximately equal
        assert after.mean() < 1.5 * before.mean()
        assert after.quantile(0.99) < 1.5 * before.quantile(0.99)


def test_weights_that_did_not_arrive(make_model, make_engine, monkeypatch):
    model = make_model("Qwen3")
    engine = make_engine(model)

    def lossy(tensors, path):
        name = "model.layers.2.mlp.up_proj.weight"
        save_file(tensors | {name: tensors[name].bfloat16().float()}, path)

    monkeypatch.setattr(f"{WEIGHTS}.save_file", lossy)
    with pytest.raises(MiniRLError, match=r"1 of \d+ weights .* the first is model\.layers\.2\.mlp\.up_proj\.weight"):
        engine.update_weights(model)


def test_experts_that_reloading_leaves_unpacked(make_model, make_engine, monkeypatch):
    """vLLM's own reload on a CPU does not pack experts; the engine then computes wrong values."""
    monkeypatch.setattr(f"{WEIGHTS}.pack_experts", lambda model: None)
    with pytest.raises(MiniRLError, match="cannot take new weights for a Qwen3MoeForCausalLM"):
        make_engine(make_model("Qwen3-MoE"))
