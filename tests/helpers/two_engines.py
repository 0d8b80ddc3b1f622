"""Engines of tiny models, and faults to put into one of them."""

import copy

import torch
from minirl.config import RolloutConfig
from minirl.discrepancy.engines import inference_engine, training_engine
from minirl.discrepancy.settings import EngineSettings, InferenceSettings
from tiny_moe import tiny

from minirl_kernels.discrepancy import compare_engines
from minirl_kernels.integrations.transformers import enable_log_probs

# prompts of several lengths: decoding pads them on the left, scoring on the right
PROMPTS = [[5], [7, 8, 9, 10, 11, 12], [13, 14, 15], [16, 17], [18, 19, 20, 21], [22, 23, 24, 25, 26]]
ENDS = [1, 2, 3, 40, 41, 42, 43, 44, 45, 46]


def model_of(name, **changes):
    """A model whose tokens differ clearly and whose layers are far from the identity."""
    return enable_log_probs(tiny(name, initializer_range=0.2, **changes).eval())


def planted(model, name, change):
    """A copy of the model in which change(tensor) replaces the parameter or buffer `name`."""
    faulty = copy.deepcopy(model)
    place, _, attribute = name.rpartition(".")
    tensor = getattr(faulty.get_submodule(place), attribute)
    with torch.no_grad():
        tensor.copy_(change(tensor))
    return faulty


def rounded(weight):
    return weight.bfloat16().float()


def compared(
    mu, pi, *, mu_settings=None, pi_settings=None, prompts=PROMPTS, temperature=1.0, updated=None, wrap=None, **options
):
    """The report on two models; by default each scores whole sequences.

    wrap: a function applied to each engine.
    """
    sampling = RolloutConfig(max_new_tokens=7, temperature=temperature, batch_size=64)
    mu_settings = InferenceSettings(**{"decode": False, **(mu_settings or {})})
    pi_settings = EngineSettings(**(pi_settings or {}))
    replay = options.get("routing_replay", "disabled")
    wrap = wrap or (lambda engine: engine)
    return compare_engines(
        wrap(inference_engine(mu, mu_settings, sampling, ENDS, records_routing=replay != "disabled")),
        wrap(training_engine(pi, pi_settings, temperature, "pi", records_routing=replay == "R2")),
        prompts,
        updated=None if updated is None else training_engine(updated, pi_settings, temperature, "pi"),
        **options,
    )
