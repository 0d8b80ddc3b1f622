"""The cost of batch-invariant mode in vLLM on a CPU: tokens per second of processor time on one thread.

    OMP_NUM_THREADS=1 MINIRL_BATCH_INVARIANT=1 python bench/vllm_tokens.py float32

and the same without MINIRL_BATCH_INVARIANT. The argument is float32, bfloat16 or autocast; the model is the example's.
Processor time leaves out other work on the machine, which a step of a few milliseconds is short beside.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import tomllib
from pathlib import Path

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR")

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig
from vllm import LLM, SamplingParams

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "arithmetic.toml"
SEQUENCES, NEW_TOKENS, ROUNDS = 64, 32, 5


def make_checkpoint(folder: str) -> None:
    keys = tomllib.loads(EXAMPLE.read_text())["model"]["config"]
    del keys["model_type"]
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**keys, vocab_size=64, pad_token_id=0, eos_token_id=1, bos_token_id=2)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def main(setting: str) -> None:
    more = {"additional_config": {"minirl_autocast": "bfloat16"}} if setting == "autocast" else {}
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(folder)
        llm = LLM(
            folder,
            dtype="float32" if setting == "autocast" else setting,
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_model_len=64,
            max_num_seqs=SEQUENCES,
            kv_cache_memory_bytes=64 << 20,
            logprobs_mode="processed_logprobs",
            **more,
        )
    prompts = [{"prompt_token_ids": [3 + (7 * i + 3 * j) % 60 for j in range(10 + i % 20)]} for i in range(SEQUENCES)]
    sampling = SamplingParams(max_tokens=NEW_TOKENS, logprobs=0, detokenize=False, ignore_eos=True)
    seconds = []
    for _ in range(1 + ROUNDS):  # the first round compiles
        llm.reset_prefix_cache()
        start = time.process_time()
        llm.generate(prompts, sampling, use_tqdm=False)
        seconds.append(time.process_time() - start)
    print(f"{setting}: {SEQUENCES * NEW_TOKENS / sorted(seconds[1:])[ROUNDS // 2]:.0f} tokens per second")


if __name__ == "__main__":
    main(*sys.argv[1:])
