"""Answers and settings of vLLM, which tests/with_vllm requests in processes of their own."""

from pathlib import Path

from safetensors.torch import load_file
from vllm import LLM, EngineArgs, SamplingParams

from minirl_kernels.batch_invariant import audit

EAGER = {"skip_tokenizer_init": True, "enforce_eager": True}


def answers(engine, rounds, audited=False):
    """The answers by round and request, and the number of "preemptions".

    An answer has lists token_ids, log_probs and prompt_log_probs, and the number of cached tokens. engine: arguments of
    LLM. rounds: by name, each with prompts and the sampling of each prompt. A round may name a checkpoint to load
    first: "reload_weights" loads it by vLLM's worker, "load_weights" into the existing model. audited: whether to add
    the operations of the last round that are "not covered" by the mode.
    """
    llm = LLM(disable_log_stats=False, kv_cache_memory_bytes=64 << 20, **EAGER, **engine)
    found = {}
    for name, asked in rounds.items():
        if "reload_weights" in asked:
            llm.collective_rpc("reload_weights", kwargs={"weights_path": asked["reload_weights"]})
        if "load_weights" in asked:
            weights = load_file(Path(asked["load_weights"]) / "model.safetensors")
            llm.apply_model(lambda model, weights=weights: len(model.load_weights(weights.items())))
        llm.reset_prefix_cache()
        found[name] = _answers_of(llm, asked["prompts"], asked["sampling"])
    found["preemptions"] = next(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")
    if audited:  # sees operations of this thread only
        with audit() as noted:
            _answers_of(llm, asked["prompts"][:3], asked["sampling"][:3])
        found["not covered"] = sorted({call.split()[0] for call in noted.not_covered})
    llm.llm_engine.engine_core.shutdown()
    return found


def configured(model, changes):
    """For each change of the settings: the worker class and the dtype of the cache, or the error."""
    found = []
    for change in changes:
        try:
            config = EngineArgs(**{"model": model, "dtype": "float32", **EAGER, **change}).create_engine_config()
            found.append(f"{config.parallel_config.worker_cls} {config.cache_config.cache_dtype}")
        except ValueError as error:
            found.append(" ".join(str(error).split()))
    return found


def _answers_of(llm, prompts, sampling):
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        [SamplingParams(**{"detokenize": False, "ignore_eos": True, **each}) for each in sampling],
        use_tqdm=False,
    )
    return [
        {
            "token_ids": list(output.outputs[0].token_ids),
            "log_probs": _values(output.outputs[0].token_ids, output.outputs[0].logprobs),
            "prompt_log_probs": _values(output.prompt_token_ids[1:], (output.prompt_logprobs or [])[1:]),
            "cached": output.num_cached_tokens,
        }
        for output in outputs
    ]


def _values(token_ids, by_place):
    return [found[token].logprob for token, found in zip(token_ids, by_place or [], strict=False)]
