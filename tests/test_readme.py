"""The python blocks of the README, docs/losses.md and docs/batch_invariance.md run in order in one interpreter.

All blocks with a loss give the same loss and gradient.
"""

import subprocess
import sys

import pytest
import torch
from documents import loss_blocks

BLOCKS = loss_blocks()
# blocks for logits, hidden states, a transformers model, replayed experts, and the library's experts
LOSSES = [number for number, block in enumerate(BLOCKS) if "loss.backward()" in block]


def test_a_new_interpreter_runs_them(tmp_path):
    """Every block from the first loss on ends with a print or an assert."""
    code = "\n".join(BLOCKS)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(LOSSES)
    assert len(LOSSES) == 5
    last = [block.splitlines()[-1] for block in BLOCKS[LOSSES[0] :]]
    assert all(line.startswith(("print(", "assert ")) for line in last)
    assert last[-1].startswith("assert torch.equal(")


def test_all_ways_to_the_loss_agree():
    names, seen, losses, gradients = {}, [], [], []
    for number, block in enumerate(BLOCKS):
        exec(block, names)
        if number == 0:
            names["model"].lm_head.register_forward_hook(lambda module, arguments, output: seen.append(output))
        if number in LOSSES:
            losses.append(names["out"].loss.detach())
            gradients.append([weight.grad.clone() for weight in names["model"].parameters()])
            names["model"].zero_grad()
        if number == LOSSES[-1]:
            assert seen[0].numel()
            assert not any(values.numel() for values in seen[-5:])  # from the three blocks of a transformers model
            scored = names["loss_mask"]
            assert torch.equal(names["token_ids"][scored], names["input_ids"][names["is_response"]])
    assert names["model"].config._experts_implementation == "minirl"
    assert losses[0] != 0
    for loss, gradient in zip(losses[1:], gradients[1:], strict=True):
        torch.testing.assert_close(loss, losses[0])
        torch.testing.assert_close(gradient, gradients[0])


def test_gradient_is_where_the_loss_mask_is():
    names = {}
    for block in BLOCKS[: LOSSES[0]]:
        exec(block, names)
    names["fused"] = names["mk"].fused_policy_loss
    logits = names["model"](names["input_ids"]).logits.detach().requires_grad_()
    names["model"] = lambda input_ids: type("Output", (), {"logits": logits})
    exec(BLOCKS[LOSSES[0]], names)
    assert torch.equal(logits.grad.abs().sum(-1) > 0, names["loss_mask"])
    assert torch.equal(names["loss_mask"][:, :-1], names["is_response"][:, 1:])
    assert not names["loss_mask"][:, -1].any()


def test_same_bits_are_those_of_the_mode(monkeypatch):
    """Without the mode, the assertion in the block's last line fails."""
    names = {}
    for block in BLOCKS[:-1]:
        exec(block, names)
    monkeypatch.setattr(names["mk"], "batch_invariant_mode", torch.no_grad)
    with pytest.raises(AssertionError):
        exec(BLOCKS[-1], names)
