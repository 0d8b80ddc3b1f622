"""A decode is aligned with whole sequences token by token, for families that mark positions in different ways."""

import copy

import pytest
from position_families import family
from two_engines import PROMPTS as UNEQUAL
from two_engines import compared, planted

from minirl_kernels.integrations.transformers import enable_log_probs

# generate drops a mask of ones: for prompts of equal length, and for a single prompt
PROMPTS = {"equal": [[5, 6, 7], [8, 9, 10], [11, 12, 13]], "single": [[7, 8, 9, 10]], "unequal": UNEQUAL}
# {family: (name of the layers, a module in layer 1)}
FAULTS = {
    "Llama": ("model.layers", "mlp.up_proj"),
    "Qwen3": ("model.layers", "self_attn.v_proj"),
    "Qwen3Moe": ("model.layers", "self_attn.v_proj"),
    "GPTJ": ("transformer.h", "mlp.fc_in"),
    "GPT2": ("transformer.h", "mlp.c_fc"),
    "OPT": ("model.decoder.layers", "fc1"),
    "Bloom": ("transformer.h", "mlp.dense_h_to_4h"),
    "XGLM": ("model.layers", "fc1"),
    "Mamba": ("backbone.layers", "mixer.in_proj"),
}
LARGEST = {"float32": 1e-5, "bfloat16": 0.1}  # relative difference caused by rounding


def every_case(names):
    """The family and the prompts decide how positions are marked, and the dtype decides how values round."""
    cases = [(name, prompts, "float32") for name in names for prompts in PROMPTS]
    cases += [(name, "unequal", "bfloat16") for name in names]
    return pytest.mark.parametrize(("name", "prompts", "dtype"), cases)


def report_on(mu, pi, prompts, dtype="float32", *, decode=True, **settings):
    settings = {"dtype": dtype, **settings}
    options = {"prompts": PROMPTS[prompts], "trace_sequences": 6, "seed": 7}
    return compared(mu, pi, mu_settings={**settings, "decode": decode}, pi_settings=settings, **options)


@every_case(FAULTS)
def test_a_decode_differs_by_roundings_alone(name, prompts, dtype):
    model = enable_log_probs(family(name))
    report = report_on(model, model, prompts, dtype)
    assert report.metrics["num_tokens"] >= 2 * len(PROMPTS[prompts])  # some tokens were decoded
    read = sum(map(len, PROMPTS[prompts])) - len(PROMPTS[prompts])
    assert report.modules.tokens == read + report.metrics["num_tokens"]
    assert max(event.difference.relative for event in report.modules.modules) < LARGEST[dtype]
    assert [number for number, _ in report.modules.layers] == [0, 1, 2]
    for layer in report.routing or []:
        assert layer.equal_fraction > 0.9
    assert report_on(model, model, prompts, dtype, decode=False).modules.first is None


@every_case(FAULTS)
def test_a_fault_in_a_layer_is_named(name, prompts, dtype):
    layers, module = FAULTS[name]
    model = enable_log_probs(family(name))
    faulty = planted(model, f"{layers}.1.{module}.weight", lambda weight: weight + 2 * weight.flip(0))
    decoded = report_on(faulty, model, prompts, dtype).modules
    names = [event.module for event in decoded.modules]
    place = names.index(f"{layers}.1.{module}")
    assert max(event.difference.relative for event in decoded.modules[:place]) < LARGEST[dtype]
    assert decoded.modules[place].difference.relative > 1
    # without an earlier difference, a growth factor is not defined
    found = decoded.jump if decoded.first.module in names[:place] or decoded.first.before else decoded.first
    assert (found.module, found.layer, found.before) == (f"{layers}.1.{module}", 1, None)
    first = report_on(faulty, model, prompts, dtype, decode=False).modules.first
    assert (first.module, first.layer, first.before) == (f"{layers}.1.{module}", 1, None)


@every_case(["Llama", "Qwen3", "Qwen3Moe", "GPT2", "OPT"])
def test_equal_bits_have_no_difference(name, prompts, dtype):
    model = enable_log_probs(family(name))
    report = report_on(model, model, prompts, dtype, batch_invariant=True)
    assert report.metrics["log_d_abs_max"] == report.full_kl_max == 0
    assert report.modules.first is None
    assert all(event.difference.is_none for event in report.modules.modules)
    assert all((layer.equal_fraction, layer.overlap) == (1, 1) for layer in report.routing or [])


class Unmasked:
    """An engine with its own decode loop, without a mask, and with a new cache object in each forward."""

    def __init__(self, engine):
        self._engine, self.model = engine, engine.model
        if hasattr(engine, "score"):
            self.score = engine.score

    def generate(self, prompts, *, seed):
        def forget(module, args, kwargs):
            return args, {**kwargs, "attention_mask": None, "past_key_values": copy.deepcopy(kwargs["past_key_values"])}

        handle = self.model.register_forward_pre_hook(forget, with_kwargs=True, prepend=True)
        try:
            return self._engine.generate(prompts, seed=seed)
        finally:
            handle.remove()


@pytest.mark.parametrize("name", ["Qwen3", "Qwen3Moe"])
def test_forwards_that_do_not_say_where_their_tokens_are(name):
    model = enable_log_probs(family(name))
    report = compared(model, model, mu_settings={"decode": True}, prompts=PROMPTS["equal"], wrap=Unmasked, batch_size=2)
    assert report.modules is None
    assert report.modules_missing.startswith("a forward of mu has token ")
    assert "its attention_mask or its cache must show the earlier tokens" in report.modules_missing
    if name == "Qwen3Moe":
        assert (report.routing, report.routing_missing) == (None, report.modules_missing)
