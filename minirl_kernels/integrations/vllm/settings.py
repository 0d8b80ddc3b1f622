"""Checks that vLLM's settings are supported by the mode on a CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from vllm import envs
from vllm.config import CompilationMode, VllmConfig

ARCHITECTURES = ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM")
WORKER = f"{__package__}.worker.BatchInvariantWorker"
AUTOCAST = "minirl_autocast"
RECORDS_ROUTING = "minirl_records_routing"


def prepare(config: VllmConfig) -> None:
    """Check the settings, and select BatchInvariantWorker.

    Raises ValueError that names each unsupported setting, its value, and the supported values.
    """
    # A trainer may start another engine without the mode in this process; a tool may run without a model.
    if os.environ.get("MINIRL_BATCH_INVARIANT") != "1" or config.model_config is None:
        return
    refused = [
        f"{name} is {value!r}: it must be {' or '.join(map(repr, allowed))}"
        for name, value, allowed in _expected(config)
        if value not in allowed
    ]
    if refused:
        raise ValueError(f"MINIRL_BATCH_INVARIANT is 1, and on a CPU {'; '.join(refused)}")
    config.parallel_config.worker_cls = WORKER
    if autocast_dtype(config) is not None:
        # rounds the cache when it is written, instead of at every read
        config.cache_config.cache_dtype = _autocast(config)


def autocast_dtype(config: VllmConfig) -> torch.dtype | None:
    """The autocast dtype for float32 weights, as in the trainer; None: compute in the model's dtype."""
    name = _autocast(config)
    return None if name is None else getattr(torch, name)


def records_routing(config: VllmConfig) -> bool:
    """Whether training records or replays experts. vLLM then computes expert weights by moe_routing too."""
    return _extra(config).get(RECORDS_ROUTING, False)


def _autocast(config: VllmConfig) -> str | None:
    return _extra(config).get(AUTOCAST)


def _extra(config: VllmConfig) -> dict:
    """additional_config; empty if it is an object of another plugin."""
    return config.additional_config if isinstance(config.additional_config, dict) else {}


def _expected(config: VllmConfig) -> Iterator[tuple[str, object, tuple]]:
    """(name of a setting, its value, the supported values)"""
    model, parallel, autocast = config.model_config, config.parallel_config, _autocast(config)
    rope = getattr(model.hf_text_config, "rope_parameters", None) or {}
    yield "the architecture", model.architecture, ARCHITECTURES
    yield "runner", model.runner_type, ("generate",)
    yield f"additional_config[{AUTOCAST!r}]", autocast, (None, "bfloat16")
    yield "dtype", model.dtype, (torch.float32,) if autocast else (torch.float32, torch.bfloat16)
    yield "head_dtype", model.head_dtype, (model.dtype,)
    yield "quantization", model.quantization, (None,)
    yield "rope_type", rope.get("rope_type", "default"), ("default",)
    yield "partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), (1.0,)
    yield "attention_bias", getattr(model.hf_text_config, "attention_bias", False), (False,)
    yield "kv_cache_dtype", config.cache_config.cache_dtype, ("auto", "bfloat16") if autocast else ("auto",)
    yield "the compilation mode (enforce_eager=True)", config.compilation_config.mode, (CompilationMode.NONE,)
    yield "tensor_parallel_size", parallel.tensor_parallel_size, (1,)
    yield "pipeline_parallel_size", parallel.pipeline_parallel_size, (1,)
    yield "data_parallel_size", parallel.data_parallel_size, (1,)
    yield "worker_cls", parallel.worker_cls, ("vllm.v1.worker.cpu_worker.CPUWorker", WORKER)
    yield "enable_lora", config.lora_config is not None, (False,)
    yield "speculative_config", config.speculative_config, (None,)
    yield "kv_transfer_config", config.kv_transfer_config, (None,)
    yield "VLLM_USE_V2_MODEL_RUNNER", config.use_v2_model_runner, (False,)
    yield "VLLM_BATCH_INVARIANT", envs.VLLM_BATCH_INVARIANT, (False,)
