"""A whole dense model of transformers: a training pass and decoding, with batch-invariant mode and without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from harness import Contender, Inputs
from torch import Tensor

from minirl_kernels import batch_invariant_mode

TRAINING, DECODING = "training pass of a model", "decoding of a model"
ON, OFF = "batch_invariant_mode", "the mode switched off"
NEW_TOKENS = 32


@dataclass
class ModelBatch(Inputs):
    """Responses of equal length, for two models with the same weights: ours with our attention, stock with SDPA."""

    ours: torch.nn.Module
    stock: torch.nn.Module
    input_ids: Tensor  # [B, L]
    token_ids: Tensor  # [B, L], of the next position
    loss: dict  # the arguments of the policy loss
    dtype: torch.dtype

    @cached_property
    def parameter_bytes(self) -> int:
        return sum(weight.nbytes for weight in self.ours.parameters())


def model_batch(responses, tokens, layers, hidden_size, vocab_size, *, dtype, device) -> ModelBatch:
    generator = torch.Generator(device).manual_seed(0)
    shape = (responses, tokens // responses)
    input_ids = torch.randint(2, vocab_size, shape, device=device, generator=generator)
    token_ids = input_ids.roll(-1, 1)
    token_ids[:, -1] = -100
    loss = {
        "old_log_probs": None,
        "rollout_log_probs": torch.full(shape, -12.0, device=device),
        "advantages": torch.randn(responses, device=device, generator=generator),
        "loss_mask": None,
    }
    models = [_model(layers, hidden_size, vocab_size, name, device) for name in ("minirl", "sdpa")]
    return ModelBatch(*models, input_ids, token_ids, loss, dtype)


def _model(layers, hidden_size, vocab_size, attention, device):
    from transformers import AutoModelForCausalLM, Qwen3Config

    from minirl_kernels.integrations.transformers import enable_log_probs

    heads = {"num_attention_heads": hidden_size // 64, "num_key_value_heads": hidden_size // 128 or 1}
    sizes = {"hidden_size": hidden_size, "intermediate_size": 3 * hidden_size, "num_hidden_layers": layers}
    config = Qwen3Config(
        vocab_size=vocab_size, **sizes, **heads, head_dim=min(hidden_size // 4, 128), pad_token_id=0, eos_token_id=1
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    return enable_log_probs(model.eval())


def training_contenders(batch: ModelBatch) -> list[Contender]:
    def forward_backward(model):
        with torch.autocast(batch.input_ids.device.type, dtype=batch.dtype):
            out = model(batch.input_ids, token_ids=batch.token_ids, policy_loss=batch.loss, use_cache=False)
        out.loss.backward()
        model.zero_grad()
        return {"log_probs": out.log_probs.detach()}

    return _contenders(batch, forward_backward)


def decoding_contenders(batch: ModelBatch) -> list[Contender]:
    """The tokens are not compared: a rounding may change one, and all after it."""

    @torch.no_grad()
    def decode(model):
        with torch.autocast(batch.input_ids.device.type, dtype=batch.dtype):
            length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
            mask = torch.ones_like(batch.input_ids)
            model.generate(batch.input_ids, attention_mask=mask, do_sample=False, **length)
        return {}

    return _contenders(batch, decode)


def _contenders(batch: ModelBatch, run: Callable) -> list[Contender]:
    """Run inside the mode, since entering it takes longer than leaving it."""
    return [
        Contender(ON, lambda: run(batch.ours), kind="ours"),
        Contender(OFF, batch_invariant_mode(False)(lambda: run(batch.stock))),
    ]
