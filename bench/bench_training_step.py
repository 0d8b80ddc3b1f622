"""One update of the example's model (forward, loss, backward): without logits, with logits, and in eager torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from harness import Contender, Inputs
from minirl.batch import Batch
from minirl.config_file import load_config
from minirl.models import autocast, build_model
from minirl.rollout import Rollouts
from minirl.seeds import derive_seed
from minirl.tasks import ArithmeticTask, ProblemStream
from minirl.tokenizer import character_tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from minirl_kernels import fused_policy_loss, group_advantages, policy_loss
from minirl_kernels.integrations.transformers import enable_log_probs

CONFIG = load_config(Path(__file__).resolve().parent.parent / "examples" / "arithmetic.toml")
TOKENIZER = character_tokenizer(ArithmeticTask.characters)
WIDTH = 9  # tokens of "49+49=98" and its end token
OURS = "model(…, token_ids, policy_loss)"
LOGITS, EAGER = "logits and fused_policy_loss(overwrite_logits=True)", "logits and eager torch"


@dataclass
class Step(Inputs):
    """A model, and a mini-batch of whole groups in one micro-batch, before its first update."""

    model: PreTrainedModel
    batch: Batch
    loss: dict[str, Tensor]  # the arguments that every policy loss takes
    dtype: torch.dtype

    def forward(self, **arguments):
        batch = self.batch
        with autocast(self.model.device, str(self.dtype).removeprefix("torch.")):
            return self.model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **arguments)


def make_step(tokens: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> Step:
    """Correct answers to tokens / WIDTH / group_size sums; half of each group gets the reward."""
    group_size = CONFIG.rollout.group_size
    model = build_model(CONFIG.model, TOKENIZER, derive_seed(CONFIG.seed, "weights"))
    if vocab_size != len(TOKENIZER):
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
    model = enable_log_probs(model.to(device))
    problems = ProblemStream(ArithmeticTask(CONFIG.task).train, CONFIG.seed, "bench").take(
        0, tokens // WIDTH // group_size
    )
    responses = [TOKENIZER(problem.answer + "<eos>").input_ids for problem in problems for _ in range(group_size)]
    rollouts = Rollouts.collate(
        [TOKENIZER(problem.prompt).input_ids for problem in problems],
        responses,
        [[0.0] * len(response) for response in responses],
        ["stop"] * len(responses),
        pad_token_id=TOKENIZER.pad_token_id,
    )
    rewards = torch.tensor([1.0, 0.0]).repeat(len(responses) // 2)
    whole = Batch.from_rollouts(rollouts, group_advantages(rewards, rollouts.group_ids))
    (batch,) = whole.micro_batches(len(whole), device)
    step = Step(model, batch, {}, dtype)
    with torch.no_grad():
        old_log_probs = step.forward(token_ids=batch.token_ids).log_probs
    noise = torch.randn(old_log_probs.shape, generator=torch.Generator().manual_seed(0)).to(device)
    loss = {
        "old_log_probs": old_log_probs,
        "rollout_log_probs": old_log_probs + 0.1 * noise,
        "advantages": batch.advantages,
        "loss_mask": batch.loss_mask,
    }
    return replace(step, loss=loss)


def ours(step):
    return backward(step, step.forward(token_ids=step.batch.token_ids, policy_loss=step.loss))


def from_logits(step):
    logits = step.forward().logits
    return backward(step, fused_policy_loss(logits, step.batch.token_ids, overwrite_logits=True, **step.loss))


def eager(step):
    log_p = torch.log_softmax(step.forward().logits, -1, dtype=torch.float32)
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(-1)
    log_probs = log_p.gather(-1, step.batch.token_ids.clamp(min=0)[..., None]).squeeze(-1)
    return backward(step, policy_loss(log_probs, entropy=entropy, **step.loss))


def backward(step, out):
    grads = torch.autograd.grad(out.loss, tuple(step.model.parameters()))
    mask = step.batch.loss_mask
    return {
        "loss": out.loss.detach(),
        "log_probs": out.log_probs.detach()[mask],
        "entropy": out.entropy.detach()[mask],
        "grad_embeddings": grads[0],
        "grad_head": grads[-1],
    }


def contenders(step):
    return [
        Contender(OURS, partial(ours, step), kind="ours"),
        Contender(LOGITS, partial(from_logits, step)),
        Contender(EAGER, partial(eager, step)),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("responses", "vocab_size"), [(256, len(TOKENIZER)), (64, 151_936)])
def test_update(compare, device, dtype, responses, vocab_size):
    compare(
        "an update",
        make=partial(make_step, dtype=dtype, device=device),
        contenders=contenders,
        shape={"tokens": WIDTH * responses, "vocab_size": vocab_size},
        small={"tokens": WIDTH * 16, "vocab_size": min(vocab_size, 515)},
        dtype=dtype,
        # every weight read once, its gradient written once
        floor_bytes=lambda step: 2 * sum(weight.nbytes for weight in step.model.parameters()),
    )
