"""Changes after enable_log_probs: a replaced forward, copies, other processes, and disable_log_probs."""

import pickle

import pytest
import torch
from causal_models import V, gradients, make

from minirl_kernels import batch_invariant_mode, token_logprobs
from minirl_kernels.integrations.transformers import disable_log_probs, enable_log_probs

pytestmark = pytest.mark.usefixtures("cpu")


def expected_of(model, ids):
    input_ids, token_ids = ids
    return token_logprobs(model(input_ids).logits, token_ids, temperature=0.7)


def scored(model, ids):
    input_ids, token_ids = ids
    return model(input_ids, token_ids=token_ids, temperature=0.7).log_probs


def test_a_forward_that_the_user_replaces_later_is_called(ids):
    model = enable_log_probs(make("qwen3"))
    before, theirs, calls = scored(model, ids), model.forward, []

    def forward(*args, **kwargs):
        calls.append(kwargs)
        return theirs(*args, **kwargs)

    model.forward = forward
    assert torch.equal(scored(model, ids), before)
    assert torch.equal(scored(enable_log_probs(model), ids), before)
    assert len(calls) == 2
    assert not any("token_ids" in kwargs for kwargs in calls)
    assert torch.equal(scored(disable_and_enable(model), ids), before)


def disable_and_enable(model):
    return enable_log_probs(disable_log_probs(model))


@pytest.mark.parametrize("patch", ["apply_liger_kernel_to_qwen3", "_apply_liger_kernel_to_instance"])
@pytest.mark.parametrize("enable_first", [True, False])
def test_liger_patches_the_instance(ids, patch, enable_first):
    monkey_patch = pytest.importorskip("liger_kernel.transformers.monkey_patch")
    model = make("qwen3")
    expected = expected_of(model, ids)
    if enable_first:
        enable_log_probs(model)
    only_forward = {"rope": False, "rms_norm": False, "swiglu": False, "fused_linear_cross_entropy": True}
    getattr(monkey_patch, patch)(model=model, **only_forward)
    assert "liger" in model.forward.__func__.__module__
    for _ in range(2):
        enable_log_probs(model)
        torch.testing.assert_close(scored(model, ids), expected)
    scored(model.train(), ids).sum().backward()
    assert "lm_head.weight" in gradients(model)


def test_accelerate_wraps_the_forward_and_takes_it_off_again(ids, accelerator):
    model = make("qwen3")
    unwrapped = expected_of(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        prepared = scored(enable_log_probs(make("qwen3")), ids)
    model = accelerator.prepare(enable_log_probs(model))
    assert "_original_forward" in vars(model)
    for _ in range(2):
        assert torch.equal(scored(model, ids), prepared)
        enable_log_probs(model)
    model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    for _ in range(2):
        torch.testing.assert_close(scored(model, ids), unwrapped)
        enable_log_probs(model)


@pytest.fixture
def accelerator(monkeypatch):
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("kind", ["qwen3", "gemma2", "mixtral"])
def test_token_ids_that_nobody_takes_are_refused(ids, kind):
    """transformers ignores unknown keywords and returns logits, so token_ids in model.forward must raise an error."""
    input_ids, token_ids = ids
    model = enable_log_probs(make(kind))
    with pytest.raises(TypeError, match=r"token_ids was given to model\.forward\(…\), which does not take it: call mo"):
        model.forward(input_ids, token_ids=token_ids)
    with pytest.raises(ValueError, match="temperature is given without token_ids"):
        model(input_ids, temperature=0.7)


def test_other_output_embeddings_are_told_and_enabled_again(ids):
    model = enable_log_probs(make("qwen3"))
    model.resize_token_embeddings(V + 3)
    with pytest.raises(ValueError, match="output embeddings were replaced after enable_log_probs: it must be called"):
        scored(model, ids)
    with batch_invariant_mode(), torch.no_grad(), pytest.raises(ValueError, match="output embeddings were replaced"):
        model(ids[0])  # it would sample from logits that training does not compute
    torch.testing.assert_close(scored(enable_log_probs(model), ids), expected_of(model, ids))


def test_other_weights_of_the_same_output_embeddings_are_used(ids):
    model = enable_log_probs(make("gpt2"))  # its head is tied to its embedding
    model.resize_token_embeddings(V + 3)
    torch.testing.assert_close(scored(model, ids), expected_of(model, ids))


@pytest.mark.parametrize("times", [1, 2])
def test_disabled_as_if_never_enabled(ids, times):
    model, untouched = make("qwen3"), make("qwen3")
    for _ in range(times):
        enable_log_probs(model)
    assert disable_log_probs(model) is model
    assert disable_log_probs(model) is model
    for module, other in zip(model.modules(), untouched.modules(), strict=True):
        assert vars(module).keys() == vars(other).keys()
        for name, value in vars(module).items():
            if "hook" in name:
                assert value == vars(other)[name], name
    output = model(ids[0], token_ids=ids[1])  # transformers ignores an unknown keyword
    assert torch.equal(output.logits, untouched(ids[0]).logits)


def test_an_interrupted_call_is_over(ids):
    """KeyboardInterrupt skips even the hooks registered with always_call."""
    model = enable_log_probs(make("qwen3"))
    before = scored(model, ids)

    def interrupt(module, args):
        handle.remove()
        raise KeyboardInterrupt

    handle = model.model.norm.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        scored(model, ids)
    assert model(ids[0]).logits.shape == (3, 7, V)
    assert torch.equal(scored(model, ids), before)


def test_the_output_is_the_models_own_class_with_three_fields(ids):
    model = enable_log_probs(make("qwen3_moe"))
    own = type(make("qwen3_moe")(ids[0]))
    output = model(ids[0], token_ids=ids[1])
    assert isinstance(output, own)
    assert {"log_probs", "entropy", "policy_loss"} <= set(output.__dataclass_fields__)
    assert output.policy_loss is None
    again = pickle.loads(pickle.dumps(model(ids[0], token_ids=ids[1], use_cache=False)))
    assert isinstance(again, own)
    assert torch.equal(again.log_probs, output.log_probs)
