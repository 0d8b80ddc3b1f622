"""Builds or loads the policy and its tokenizer, and selects device, dtype and mode of its computation."""

from __future__ import annotations

import difflib
from contextlib import AbstractContextManager, nullcontext

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from minirl_kernels import batch_invariant_mode, record_routing
from minirl_kernels.integrations.transformers import check_batch_invariant, enable_log_probs

from .config import ModelConfig, TrainConfig
from .errors import MiniRLError
from .loading import check_computes, check_finite, does_compute, load_model, one_message
from .seeds import derive_seed
from .tasks import ArithmeticTask
from .tokenizer import character_tokenizer


def make_model(config: TrainConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The policy, float32 and on the run's device, with `enable_log_probs`; and its tokenizer.

    Raises MiniRLError.
    """
    experts, known = config.model.experts_implementation, ["eager", *ALL_EXPERTS_FUNCTIONS]
    if experts is not None and experts not in known:
        raise MiniRLError(f"model.experts_implementation is {experts!r}: it must be one of {', '.join(known)}, or none")
    if config.model.path is not None:
        model, tokenizer = load_model(config.model.path, experts)
    else:
        tokenizer = character_tokenizer(ArithmeticTask.characters)
        model = build_model(config.model, tokenizer, derive_seed(config.seed, "weights"))
    if experts is not None and not has_experts(model):
        raise MiniRLError(
            f"model.experts_implementation is {experts!r}: it must be none for a {type(model).__name__}, which has no "
            "experts that take one"
        )
    if config.batch_invariant:
        make_batch_invariant(model)
    name = config.model.path or "model.config"
    with does_compute(name, model):
        try:
            model = enable_log_probs(model.to(pick_device(config.device)))
        except (TypeError, ValueError) as error:
            raise MiniRLError(f"this model cannot be trained: {error}") from None
    with run_mode(config), autocast(model.device, config.dtype):
        check_computes(model, name)
    if config.routing_replay != "disabled":
        try:
            with record_routing(model):
                pass
        except ValueError as error:
            raise MiniRLError(f"routing_replay is {config.routing_replay!r}: it must be disabled, as {error}") from None
    return model, tokenizer


def make_batch_invariant(model: PreTrainedModel) -> None:
    """Select the attention and experts "minirl", which batch_invariant_mode needs, and check the model.

    Raises MiniRLError that names a module which is not batch-invariant.
    """
    try:
        model.set_attn_implementation("minirl")
        if has_experts(model):
            model.set_experts_implementation("minirl")
        check_batch_invariant(model)
    except ValueError as error:
        raise MiniRLError(f"a {type(model).__name__} cannot be batch-invariant: {error}") from None


def has_experts(model: PreTrainedModel) -> bool:
    """Whether the model has experts with implementations. Only transformers' decorator sets `is_transposed`."""
    return any(hasattr(module, "is_transposed") for module in model.modules())


def build_model(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """A new model from the keys of a transformers config, with random weights from `seed`. Raises MiniRLError."""
    model_config = _transformers_config(config.config, tokenizer)
    with one_message("model.config"), torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            model_config, dtype=torch.float32, experts_implementation=config.experts_implementation
        ).eval()
    check_finite(model, "model.config")
    return model


def _transformers_config(keys: dict, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    model_type = keys.get("model_type")
    is_known = isinstance(model_type, str) and model_type in CONFIG_MAPPING
    if not is_known or CONFIG_MAPPING[model_type] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise MiniRLError(
            f"model.config.model_type is {model_type!r}: it must be a causal language model of transformers, such as "
            "'qwen3_moe'"
        )
    config_class = CONFIG_MAPPING[model_type]
    special = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if "experts_implementation" in keys:
        raise MiniRLError("model.config has experts_implementation: it must be left out, the model table has its own")
    with one_message(f"model.config.model_type is {model_type!r}, of which no model can be built"):
        known = {*config_class().to_dict(), *config_class.attribute_map}
    for key in keys:
        if key in special:
            raise MiniRLError(f"model.config.{key} is {keys[key]!r}: it must be left out, the tokenizer sets it")
        # Only misspelt keys are refused, since models also read keys that their config class does not declare.
        guess = difflib.get_close_matches(key, known, n=1, cutoff=0.85)
        if key not in known and guess:
            raise MiniRLError(f"unknown key model.config.{key}: did you mean {guess[0]}?")
    with one_message("model.config"):
        return config_class(**{key: value for key, value in keys.items() if key != "model_type"}, **special)


def pick_device(name: str) -> torch.device:
    """The device; "auto" means a GPU if there is one. Raises MiniRLError if name is "cuda" and there is no GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise MiniRLError("device is 'cuda', and torch finds no GPU: it must be 'cpu' or 'auto'")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def run_mode(config: TrainConfig) -> AbstractContextManager[None]:
    """The context in which a run computes everything: batch-invariant mode, or none."""
    return batch_invariant_mode() if config.batch_invariant else nullcontext()


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """The context in which float32 weights compute in `dtype`."""
    return torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32")


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """All tokens that end a response: the tokenizer's eos_token, and the end tokens of the generation config."""
    more = model.generation_config.eos_token_id
    more = more if isinstance(more, list) else [more]
    return sorted({tokenizer.eos_token_id, *(token for token in more if token is not None)})
