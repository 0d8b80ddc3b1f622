"""Fixtures of tests that need a real vLLM (see docs/vllm.md). Without vLLM the tests are skipped.

They make tiny models, engines of the trainer, and vLLM in a separate process with its own environment variables.
"""

import importlib.util
import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from unittest import mock

import pytest
import torch
from minirl.cli import main
from minirl.config import RolloutConfig, VLLMConfig
from minirl.config_file import dump_config
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from minirl_kernels.integrations.transformers import enable_log_probs

SIZES = {
    "vocab_size": 301,
    "hidden_size": 136,  # a multiple of some vector widths only
    "intermediate_size": 200,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # so that no two tokens are equally likely
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
CONFIGS = {
    "Qwen3": Qwen3Config(**SIZES, tie_word_embeddings=True),
    "Qwen3-MoE": Qwen3MoeConfig(
        **SIZES,
        moe_intermediate_size=40,
        num_experts=8,
        num_experts_per_tok=3,
        norm_topk_prob=True,
        mlp_only_layers=[1],
        tie_word_embeddings=False,
    ),
}

# vLLM's own kernels need multiples of the vector width
STOCK_SIZES = SIZES | {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
STOCK_SIZES |= {"initializer_range": 0.02, "tie_word_embeddings": False}
STOCK_EXPERTS = {"moe_intermediate_size": 32, "num_experts": 16, "num_experts_per_tok": 4, "mlp_only_layers": [1]}
STOCK = {
    "Qwen3": Qwen3Config(**STOCK_SIZES),
    "Qwen3-MoE": Qwen3MoeConfig(**STOCK_SIZES, **STOCK_EXPERTS, norm_topk_prob=True),
}


@pytest.fixture(autouse=True, scope="session")
def vllm_is_installed():
    """Everything in this folder runs vLLM."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed: it has an environment of its own, see docs/vllm.md")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Makes the folder of a model's weights, from its name and a seed."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def make(name, seed=0) -> str:
        path = folder / f"{name}-{seed}"
        if not path.exists():
            torch.manual_seed(seed)
            AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32).save_pretrained(path)
        return str(path)

    return make


@pytest.fixture(scope="session")
def call_elsewhere():
    """Calls a function in a process per set of environment variables, since vLLM reads them when it is imported."""
    processes = {}

    def call(function, *arguments, **variables):
        # the new process must not inherit this process's settings of vLLM and of the mode
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "MINIRL_BATCH"))}
        # one thread, since two threads on one core wait for each other
        environment = {**kept, "VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "1", **variables}
        key = frozenset(variables.items())
        with mock.patch.dict(os.environ, environment, clear=True):  # inherited by the new process
            if key not in processes:
                processes[key] = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
            return processes[key].submit(function, *arguments).result()

    yield call
    for process in processes.values():
        process.shutdown()


@pytest.fixture
def train(tmp_path):
    """Runs `minirl train` with vLLM's rollouts; returns the training lines of metrics.jsonl, from step 0 on."""

    def run(config):
        path = tmp_path / "config.toml"
        path.write_text(dump_config(replace(config, run_dir=str(tmp_path / "run"))))
        main(["train", str(path), "--rollout.engine", "vllm"])
        lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
        return [line for line in lines if line["phase"] == "train"]

    return run


@pytest.fixture
def make_model():
    """A causal language model of a kind, float32."""

    def make(kind):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(STOCK[kind], dtype=torch.float32).eval()
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() > 1:
                    weight.mul_(4)  # so that no two tokens are equally likely
        return enable_log_probs(model)

    return make


@pytest.fixture
def make_engine(tmp_path):
    """Makes an engine in this process, and closes it after the test."""
    from minirl.rollout.vllm.engine import VLLMEngine

    engines = []

    def make(model, *, dtype="float32", records_routing=False, separate_process=False, args=None, **sampling):
        args = {"kv_cache_memory_bytes": 64 << 20, **(args or {})}
        config = RolloutConfig(engine="vllm", vllm=VLLMConfig(separate_process=separate_process, args=args), **sampling)
        engine = VLLMEngine(
            config,
            dtype=dtype,
            pad_token_id=0,
            eos_token_ids=[1],
            log=tmp_path / "vllm.log",
            records_routing=records_routing,
        )
        engines.append(engine)
        engine.update_weights(model)
        return engine

    yield make
    for engine in engines:
        engine.close()
