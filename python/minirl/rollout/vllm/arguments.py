"""The keyword arguments and the environment variables for creating `vllm.LLM`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from minirl_kernels.integrations.vllm.client import llm_arguments
from minirl_kernels.integrations.vllm.settings import AUTOCAST, RECORDS_ROUTING

from ...config import RolloutConfig
from ...errors import MiniRLError

CPU_CACHE_BYTES = 1 << 30  # vLLM's default takes nearly all memory of the machine

DECIDED_BY = {
    "model": "model.path",
    "dtype": "rollout.dtype",
    "quantization": "rollout.quantization",
    "max_num_seqs": "rollout.batch_size",
    "additional_config": "batch_invariant",
    **dict.fromkeys(
        ["generation_config", "logprobs_mode", "skip_tokenizer_init", "worker_extension_cls", "weight_transfer_config"],
        "the trainer",
    ),
    "enable_return_routed_experts": "routing_replay",
}


def engine_arguments(
    config: RolloutConfig,
    device: str,
    *,
    dtype: str,
    records_routing: bool,
    replays_routing: bool,
    batch_invariant: bool,
) -> dict[str, Any]:
    """Keyword arguments of `vllm.LLM`, except the model; see VLLMEngine. Raises MiniRLError."""
    for key in config.vllm.args:
        if key in DECIDED_BY:
            raise MiniRLError(f"rollout.vllm.args has {key}: it must be left out, {DECIDED_BY[key]} decides it")
    if config.quantization is not None and device == "cpu":
        raise MiniRLError(
            f"rollout.quantization is {config.quantization!r} with rollout.engine='vllm' on a CPU: it must be none "
            "there, or rollout.engine 'transformers', which rounds as FP8 engines do"
        )
    arguments = {
        **llm_arguments(device, records_routing=records_routing),
        "dtype": dtype,
        "max_num_seqs": config.batch_size,
        "logprobs_mode": "processed_logprobs",  # after the temperature, as training computes them
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
    }
    if config.quantization is not None:
        arguments["quantization"] = "fp8"
    if device == "cpu":
        arguments["kv_cache_memory_bytes"] = CPU_CACHE_BYTES
        if batch_invariant:
            # as in training: float32 weights under autocast, and moe_routing if experts are recorded or replayed
            plugin_config = {RECORDS_ROUTING: replays_routing}
            if dtype != "float32":
                plugin_config[AUTOCAST] = dtype
            arguments |= {"dtype": "float32", "additional_config": plugin_config}
    return arguments | config.vllm.args


@contextmanager
def engine_environment(config: RolloutConfig, device: str, *, batch_invariant: bool) -> Iterator[None]:
    """Sets the environment variables that vLLM reads at its start. A separate process inherits them."""
    wanted = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(config.vllm.separate_process)),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # vLLM and training use the same cores in turn
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    if batch_invariant:
        # vLLM's own mode is for GPUs only, and conflicts with this library's mode on a CPU
        wanted |= {"MINIRL_BATCH_INVARIANT": "1", "VLLM_BATCH_INVARIANT": str(int(device == "cuda"))}
    if device == "cuda":
        # Weights on a GPU are transferred by pickled handles, which both processes must allow until the end.
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    before = {name: os.environ.get(name) for name in wanted}
    set_num_threads = torch.set_num_threads
    os.environ.update(wanted)
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads  # vLLM in this process replaces it by an empty function
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
