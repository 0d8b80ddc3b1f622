"""Heads changed by PEFT: LoRA, and a trained copy (modules_to_save)."""

import copy
from contextlib import nullcontext

import pytest
import torch
from causal_models import V, gradients, make

import minirl_kernels as mk
from minirl_kernels.integrations.transformers import disable_log_probs, enable_log_probs

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("cpu")
LORA = {"r": 3, "lora_alpha": 5, "init_lora_weights": False}


def adapted(kind="qwen3", **changes):
    """A model with adapters whose weights are random instead of zero."""
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        config = peft.LoraConfig(**{**LORA, "target_modules": ["lm_head"], **changes})
        model = peft.get_peft_model(make(kind), config).eval()
        for name, weight in model.named_parameters():
            if "modules_to_save" in name:
                weight.data += 0.1 * torch.randn_like(weight)
        return model


def with_two_adapters(model):
    with torch.random.fork_rng([]):
        torch.manual_seed(4)
        model.add_adapter("other", peft.LoraConfig(target_modules=["lm_head"], r=2, init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    return model


def merged(model):
    model.merge_adapter()
    return model


HEADS = {
    "LoRA": lambda: adapted(),
    "LoRA with a bias of its own": lambda: adapted("phi", lora_bias=True),
    "LoRA beside other targets": lambda: adapted(target_modules=["lm_head", "q_proj"]),
    "LoRA on a head that is the embedding": lambda: adapted("gpt2", fan_in_fan_out=False),
    "LoRA of two adapters": lambda: with_two_adapters(adapted()),
    "LoRA that is merged": lambda: merged(adapted()),
    "LoRA in front of a softcap": lambda: adapted("gemma2"),
    "modules_to_save": lambda: adapted(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "modules_to_save of a head with a bias": lambda: adapted(
        "phi", target_modules=["q_proj"], modules_to_save=["lm_head"]
    ),
    "modules_to_save of a head that is the embedding": lambda: adapted(
        "gpt2", target_modules=["c_attn"], modules_to_save=["lm_head"], fan_in_fan_out=True
    ),
}


def scores(logits, token_ids):
    """(log_probs, entropy) of logits, at a temperature of 0.7."""
    log_p = (logits.double() / 0.7).log_softmax(-1)
    scored = token_ids != -100
    log_probs = log_p.gather(-1, token_ids.clamp(min=0)[..., None]).squeeze(-1).where(scored, 0.0)
    return log_probs, -(log_p.exp() * log_p).sum(-1).where(scored, 0.0)


def with_gradients(model, log_probs, entropy):
    if log_probs.requires_grad:
        ((log_probs * torch.linspace(-1, 1, 7)).sum() - 0.3 * entropy.sum()).backward()
    return (log_probs.detach(), entropy.detach()), gradients(model)


def assert_as_exact(ours, theirs, exact, tolerance):
    for actual, other, expected in zip(ours[0], theirs[0], exact[0], strict=True):
        error, allowed = ((values - expected).abs().max() for values in (actual, other))
        assert error <= allowed + tolerance * expected.abs().max()
    assert ours[1].keys() == exact[1].keys()
    for name, expected in exact[1].items():
        error, allowed = ((grads[name] - expected).abs().max() for grads in (ours[1], theirs[1]))
        assert error <= 2 * allowed + tolerance * expected.abs().max(), name


@pytest.mark.parametrize("name", HEADS)
def test_as_exact_as_through_the_logits_of_peft(name, ids):
    eager = HEADS[name]()
    ours, exact = copy.deepcopy(eager), copy.deepcopy(eager).double()
    output = enable_log_probs(ours)(input_ids=ids[0], token_ids=ids[1], temperature=0.7)
    assert output.logits is None
    found = with_gradients(ours, output.log_probs, output.entropy)
    theirs, expected = (
        with_gradients(model, *scores(model(input_ids=ids[0]).logits, ids[1])) for model in (eager, exact)
    )
    assert_as_exact(found, theirs, expected, 2.0**-20)
    if "merged" not in name:
        of_head = {weight for weight in found[1] if "lm_head" in weight}
        assert of_head == {weight for weight, values in eager.named_parameters() if _is_trained_head(weight, values)}


def _is_trained_head(name, weight):
    return weight.requires_grad and "lm_head" in name


@pytest.mark.parametrize("name", [name for name in HEADS if "softcap" not in name])
def test_autocast_is_as_exact_as_that_of_peft(name, ids):
    """Compares the head only, since all rounding before the head is the same."""
    eager = HEADS[name]()
    ours, exact = copy.deepcopy(eager), copy.deepcopy(eager).double()
    enable_log_probs(ours)
    hidden = []
    ours.get_output_embeddings().register_forward_pre_hook(lambda module, args: hidden.append(args[0].detach()))
    for weight_name, weight in ours.named_parameters():
        weight.requires_grad_(_is_trained_head(weight_name, weight))
    with torch.autocast("cpu", torch.bfloat16):
        output = ours(input_ids=ids[0], token_ids=ids[1], temperature=0.7)
        logits = eager.get_output_embeddings()(hidden[0])
    found = with_gradients(ours, output.log_probs, output.entropy)
    theirs = with_gradients(eager, *scores(logits, ids[1]))
    expected = with_gradients(exact, *scores(exact.get_output_embeddings()(hidden[0].double()), ids[1]))
    assert_as_exact(found, theirs, expected, 2.0**-12)


def test_an_update_that_bfloat16_weights_would_swallow_is_seen(ids):
    """In bfloat16, W + s B A rounds to W. So the adapter's product must not be added to the weight."""
    model = adapted()
    for name, weight in model.named_parameters():
        weight.data = weight.data.bfloat16()
        if "lora_B" in name:
            weight.data *= 2.0**-7
    enable_log_probs(model)
    with torch.no_grad():
        with_adapter = model(input_ids=ids[0], token_ids=ids[1], temperature=0.7).log_probs
        with model.disable_adapter():
            without = model(input_ids=ids[0], token_ids=ids[1], temperature=0.7).log_probs
        exact = disable_log_probs(copy.deepcopy(model)).double()
        expected = scores(exact(input_ids=ids[0]).logits, ids[1])[0]
        with exact.disable_adapter():
            expected -= scores(exact(input_ids=ids[0]).logits, ids[1])[0]
    assert 0.001 < expected.abs().max() < 0.05
    torch.testing.assert_close(with_adapter - without, expected.float(), rtol=0.1, atol=1e-3)


@pytest.mark.parametrize("name", ["LoRA", "modules_to_save"])
def test_adapters_that_are_disabled_switched_and_merged_later(name, ids):
    input_ids, token_ids = ids
    model = enable_log_probs(HEADS[name]())
    for way in ("on", "disabled", "on", "merged"):
        if way == "merged":
            model.merge_adapter()
        with model.disable_adapter() if way == "disabled" else nullcontext():
            expected = mk.token_logprobs(model(input_ids=input_ids).logits, token_ids)
            log_probs = model(input_ids=input_ids, token_ids=token_ids).log_probs
        torch.testing.assert_close(log_probs, expected)


def test_dropout_draws_what_peft_draws(ids):
    input_ids, token_ids = ids
    model = enable_log_probs(adapted(lora_dropout=0.5)).train()
    torch.manual_seed(5)
    expected = mk.token_logprobs(model(input_ids=input_ids).logits, token_ids)
    torch.manual_seed(5)
    log_probs = model(input_ids=input_ids, token_ids=token_ids).log_probs
    torch.testing.assert_close(log_probs, expected)
    assert not torch.allclose(model(input_ids=input_ids, token_ids=token_ids).log_probs, expected)


@pytest.mark.parametrize("name", ["LoRA", "LoRA of two adapters", "modules_to_save"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decode_in_the_mode_samples_from_what_training_computes(name, dtype, ids):
    model = enable_log_probs(HEADS[name]()).to(dtype)
    model.get_base_model().set_attn_implementation("minirl")
    with torch.no_grad(), mk.batch_invariant_mode():
        decode = model.generate(
            input_ids=ids[0],
            attention_mask=torch.ones_like(ids[0]),
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=True,
            output_logits=True,
            return_dict_in_generate=True,
        )
        sampled = mk.token_logprobs(torch.stack(decode.logits, 1), decode.sequences[:, 7:])
        token_ids = decode.sequences.roll(-1, 1)
        log_probs = model(input_ids=decode.sequences, token_ids=token_ids).log_probs
    assert torch.equal(log_probs[:, 6:-1], sampled)


def test_adapters_that_come_after_enabling(ids):
    input_ids, token_ids = ids
    model = peft.get_peft_model(enable_log_probs(make("qwen3")), peft.LoraConfig(target_modules=["lm_head"], **LORA))
    with pytest.raises(ValueError, match="the output embeddings were replaced after enable_log_probs"):
        model(input_ids=input_ids, token_ids=token_ids)
    expected = mk.token_logprobs(model(input_ids=input_ids).logits, token_ids)
    enable_log_probs(model)
    torch.testing.assert_close(model(input_ids=input_ids, token_ids=token_ids).log_probs, expected)
    assert model(input_ids=input_ids).logits.shape == (3, 7, V)
    assert not any("forward" in vars(module) for module in disable_log_probs(model).modules())


REFUSED = {
    "default is a DoraLinearVariant: it must be plain LoRA": lambda: adapted(use_dora=True),
    "are a Linear: .* has a Linear: merge or leave out its adapters": lambda: peft.get_peft_model(
        make("qwen3"), peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[])
    ),
    "are a TrainableTokensWrapper: they must be": lambda: adapted(
        "gpt2", target_modules=["c_attn"], trainable_token_indices={"wte": [3]}, fan_in_fan_out=True
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_other_adapters_of_the_head_are_refused_by_name(message):
    model = REFUSED[message]()
    with pytest.raises(TypeError, match=message):
        enable_log_probs(model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_adapters_of_single_rows_are_refused(ids):
    model = adapted()
    model.add_adapter("other", peft.LoraConfig(target_modules=["lm_head"], r=2, init_lora_weights=False))
    enable_log_probs(model)
    names = ["default", "other", "default"]
    with pytest.raises(ValueError, match="adapter_names is given with token_ids: it must be None"):
        model(input_ids=ids[0], token_ids=ids[1], adapter_names=names)
    assert model(input_ids=ids[0], adapter_names=names).logits.shape == (3, 7, V)
