"""What `vllm.LLM` is made with, and the environment that it is made in."""

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

CPU_CACHE_BYTES = 1 << 30  # what vLLM would take by itself is nearly all of a machine's memory

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
    """Keyword arguments of `vllm.LLM` without the model; see VLLMEngine. Raises MiniRLError."""
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
        "logprobs_mode": "processed_logprobs",  # of what is drawn from: with the temperature
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
    }
    if config.quantization is not None:
        arguments["quantization"] = "fp8"
    if device == "cpu":
        arguments["kv_cache_memory_bytes"] = CPU_CACHE_BYTES
        if batch_invariant:
            # float32 weights under autocast, and routers as they are recorded and replayed: as in training
            ours = {RECORDS_ROUTING: replays_routing}
            if dtype != "float32":
                ours[AUTOCAST] = dtype
            arguments |= {"dtype": "float32", "additional_config": ours}
    return arguments | config.vllm.args


@contextmanager
def engine_environment(config: RolloutConfig, device: str, *, batch_invariant: bool) -> Iterator[None]:
    """The variables that vLLM reads as it starts; its own process inherits them."""
    wanted = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(config.vllm.separate_process)),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # training takes turns with it on the same cores
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    if batch_invariant:
        # vLLM's own mode is for GPUs, and stands in the way of ours
        wanted |= {"MINIRL_BATCH_INVARIANT": "1", "VLLM_BATCH_INVARIANT": str(int(device == "cuda"))}
    if device == "cuda":
        # GPU memory is handed over by pickled handles; both processes must allow it, for as long as they talk
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    before = {name: os.environ.get(name) for name in wanted}
    set_num_threads = torch.set_num_threads
    os.environ.update(wanted)
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads  # in this process vLLM replaces it by nothing
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
