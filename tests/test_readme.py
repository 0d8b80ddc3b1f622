"""The README's example runs as it stands."""

import re
from pathlib import Path
from types import SimpleNamespace

import torch

README = Path(__file__).resolve().parent.parent / "README.md"


def test_example():
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    generator = torch.Generator().manual_seed(0)
    rows, length, vocabulary = 4, 6, 11
    logits = torch.randn(rows, length, vocabulary, generator=generator, requires_grad=True)
    loss_mask = torch.ones(rows, length, dtype=torch.bool)
    loss_mask[:, :2] = loss_mask[:, -1] = False  # the prompt, and the last position, which scores nothing
    input_ids = torch.randint(vocabulary, (rows, length), generator=generator)
    next_ids = input_ids.roll(-1, dims=1)
    old_log_probs = logits.detach().log_softmax(-1).gather(-1, next_ids.unsqueeze(-1)).squeeze(-1)
    names = {
        "model": lambda input_ids: SimpleNamespace(logits=logits),
        "input_ids": input_ids,
        "loss_mask": loss_mask,
        "old_log_probs": old_log_probs,
        "rollout_log_probs": old_log_probs - 0.01,
        "rewards": torch.tensor([1.0, 0.0, 1.0, 1.0]),
        "group_ids": torch.tensor([0] * rows),
    }
    exec(example, names)
    assert torch.isfinite(names["out"].loss)
    assert torch.equal(logits.grad.abs().sum(-1) > 0, loss_mask)
