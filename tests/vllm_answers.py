"""What vLLM answers, for tests/with_vllm: run as `python vllm_answers.py JOB ANSWERS` in a process of its own.

vLLM follows the environment from when it is imported. JOB is a file of JSON: "engine", the arguments of LLM, and
"rounds", by name, each with prompts, the sampling of each, and a checkpoint to be loaded before: as "reload_weights"
by vLLM's worker, or as "load_weights" into the model as it is.
ANSWERS becomes a file of torch: by round and request its token_ids, log_probs, prompt_log_probs and cached (tokens).
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from vllm import LLM, SamplingParams

from minirl_kernels.batch_invariant import audit


def answers_of(llm, prompts, sampling):
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        [SamplingParams(**{"detokenize": False, "ignore_eos": True, **each}) for each in sampling],
        use_tqdm=False,
    )
    return [
        {
            "token_ids": list(output.outputs[0].token_ids),
            "log_probs": values(output.outputs[0].token_ids, output.outputs[0].logprobs),
            "prompt_log_probs": values(output.prompt_token_ids[1:], (output.prompt_logprobs or [])[1:]),
            "cached": output.num_cached_tokens,
        }
        for output in outputs
    ]


def values(token_ids, by_place):
    return torch.tensor([found[token].logprob for token, found in zip(token_ids, by_place or [], strict=False)])


def load_in_place(llm, path):
    weights = load_file(Path(path) / "model.safetensors")
    llm.apply_model(lambda model: len(model.load_weights(weights.items())))


def main(job, answers):
    job = json.loads(Path(job).read_text())
    llm = LLM(skip_tokenizer_init=True, disable_log_stats=False, **job["engine"])
    found = {}
    for name, asked in job["rounds"].items():
        if "reload_weights" in asked:
            llm.collective_rpc("reload_weights", kwargs={"weights_path": asked["reload_weights"]})
        if "load_weights" in asked:
            load_in_place(llm, asked["load_weights"])
        llm.reset_prefix_cache()
        found[name] = answers_of(llm, asked["prompts"], asked["sampling"])
    found["preemptions"] = next(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")
    if job.get("audit"):  # of operations in this very thread
        with audit() as noted:
            answers_of(llm, asked["prompts"][:3], asked["sampling"][:3])
        found["not covered"] = sorted({call.split()[0] for call in noted.not_covered})
    torch.save(found, answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
