"""The README's examples run as they stand, and give the same loss and gradient."""

import re
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

README = Path(__file__).resolve().parent.parent / "README.md"
ROWS, LENGTH, V = 4, 6, 11


def small_model():
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
        "moe_intermediate_size": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    }
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        config = Qwen3MoeConfig(vocab_size=V, num_key_value_heads=1, initializer_range=0.3, **sizes)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def test_examples():
    generator = torch.Generator().manual_seed(0)
    examples = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    *examples, batch_invariant = examples
    assert len(examples) == 5
    model = small_model()
    loss_mask = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    loss_mask[:, :2] = loss_mask[:, -1] = False  # the prompt, and the last position, which scores nothing
    input_ids = torch.randint(V, (ROWS, LENGTH), generator=generator)
    logits = model(input_ids).logits.detach().requires_grad_()
    next_ids = input_ids.roll(-1, dims=1)
    old_log_probs = logits.detach().log_softmax(-1).gather(-1, next_ids.unsqueeze(-1)).squeeze(-1)
    names = {
        "torch": torch,
        "model": model,
        "input_ids": input_ids,
        "loss_mask": loss_mask,
        "old_log_probs": old_log_probs,
        "rollout_log_probs": old_log_probs - 0.01,
        "rewards": torch.tensor([1.0, 0.0, 1.0, 1.0]),
        "group_ids": torch.tensor([0] * ROWS),
    }
    seen = []
    model.lm_head.register_forward_hook(lambda module, arguments, output: seen.append(output))
    losses, gradients = [], []
    for example in examples:
        model.zero_grad()
        exec(example, names)
        losses.append(names["out"].loss.detach())
        gradients.append([weight.grad.clone() for weight in model.parameters()])
    assert seen[0].numel()
    assert not any(values.numel() for values in seen[-5:])
    assert model.config._experts_implementation == "minirl"
    assert losses[0] != 0
    for loss, gradient in zip(losses[1:], gradients[1:], strict=True):
        torch.testing.assert_close(loss, losses[0])
        torch.testing.assert_close(gradient, gradients[0])
    names |= {"prompts": input_ids, "mask": torch.ones_like(input_ids)}
    exec(batch_invariant, names)
    assert names["sequences"].shape[1] > LENGTH
    scored = names["token_ids"] != -100
    torch.testing.assert_close(names["log_probs"][scored], old_log_probs[scored])
    (of_logits,) = torch.autograd.grad(
        names["mk"].fused_policy_loss(logits, names["token_ids"], **names["policy_loss"]).loss, logits
    )
    assert torch.equal(of_logits.abs().sum(-1) > 0, loss_mask)
