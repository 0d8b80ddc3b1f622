"""Models without logits give the same log-probabilities, entropy, loss and gradients as with logits."""

import copy
import inspect

import pytest
import sharded_model
import torch
from causal_models import FAMILIES, V, gradients, make
from linear_head import assert_matrices_as_exact
from torch import nn
from torch.distributed.utils import _apply_to_tensors

from minirl_kernels import PolicyLossInputs, fused_policy_loss, linear_token_logprobs, token_logprobs
from minirl_kernels.integrations.transformers import enable_log_probs


@pytest.mark.parametrize("kind", FAMILIES)
def test_as_through_logits(kind, ids):
    input_ids, token_ids = ids
    eager = make(kind)
    ours, exact = copy.deepcopy(eager), copy.deepcopy(eager).double()
    output = enable_log_probs(ours)(input_ids, token_ids=token_ids, temperature=0.7)
    assert output.logits is None
    found = [(output.log_probs, output.entropy)]
    for other in (eager, exact):
        log_p = (other(input_ids).logits / 0.7).log_softmax(-1)
        scored = token_ids != -100
        log_probs = log_p.gather(-1, token_ids.clamp(min=0)[..., None]).squeeze(-1).where(scored, 0.0)
        found.append((log_probs, -(log_p.exp() * log_p).sum(-1).where(scored, 0.0)))
    for log_probs, entropy in found:
        ((log_probs * torch.linspace(-1, 1, 7)).sum() - 0.3 * entropy.sum()).backward()
    for values in zip(*found, strict=True):
        assert_matrices_as_exact(*values)
    reference = gradients(exact)
    assert gradients(ours).keys() == reference.keys()
    largest = max(grad.abs().max() for grad in reference.values())
    for name, exact_grad in reference.items():
        error, theirs = ((gradients(model)[name] - exact_grad).abs().max() for model in (ours, eager))
        assert error <= 2 * theirs + 2.0**-21 * largest, name


@pytest.mark.parametrize("kind", ["qwen3_moe", "gemma2", "granite", "gpt2"])
def test_policy_loss_as_through_logits(kind, ids, policy_loss):
    input_ids, token_ids = ids
    through_logits = make(kind)
    model = enable_log_probs(copy.deepcopy(through_logits))
    output = model(input_ids, token_ids=token_ids, temperature=0.7, policy_loss=policy_loss)
    output.loss.backward()
    logits = through_logits(input_ids).logits
    expected = fused_policy_loss(logits, token_ids, temperature=0.7, **policy_loss)
    expected.loss.backward()
    assert output.logits is None
    assert output.policy_loss.loss is output.loss
    for name in ("loss", "log_probs", "entropy"):
        torch.testing.assert_close(output[name], getattr(expected, name))
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, gradients(through_logits)[name])


def test_policy_loss_of_prepared_inputs(ids, policy_loss):
    input_ids, token_ids = ids
    model = enable_log_probs(make("gemma2"))
    expected = model(input_ids, token_ids=token_ids, policy_loss=policy_loss)
    inputs = PolicyLossInputs.prepare(token_ids, **policy_loss)
    found = model(input_ids, token_ids=token_ids, policy_loss={"inputs": inputs})
    assert torch.equal(found.loss, expected.loss)
    parts = zip(input_ids.split(2), token_ids.split(2), inputs.split(2), strict=True)
    losses = [model(rows, token_ids=ids, policy_loss={"inputs": part}).loss for rows, ids, part in parts]
    torch.testing.assert_close(sum(losses), expected.loss)


def test_prepared_inputs_that_a_wrapper_rounded_are_refused(ids, policy_loss):
    """FSDP casts the tensors of a dataclass too."""
    input_ids, token_ids = ids
    inputs = PolicyLossInputs.prepare(token_ids, **policy_loss)
    cast = _apply_to_tensors(lambda values: values.bfloat16() if values.is_floating_point() else values, inputs)
    model = enable_log_probs(make("gemma2"))
    with pytest.raises(TypeError, match=r"dtype torch\.bfloat16: it must be float32"):
        model(input_ids, token_ids=token_ids, policy_loss={"inputs": cast})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_and_policy_loss_have_the_same_bits(ids, policy_loss, dtype):
    """Log-probabilities have the same bits in a call with a policy loss, whose mask leaves some tokens out."""
    input_ids, token_ids = ids
    model = enable_log_probs(make("gemma2"))
    loss_mask = torch.rand(3, 7, generator=torch.Generator().manual_seed(3)) < 0.5
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        with torch.no_grad():
            old_log_probs = model(input_ids, token_ids=token_ids).log_probs
        changed = {**policy_loss, "old_log_probs": old_log_probs, "loss_mask": loss_mask}
        output = model(input_ids, token_ids=token_ids, policy_loss=changed)
    assert torch.equal(output.log_probs[loss_mask], old_log_probs[loss_mask])
    assert output.policy_loss.metrics.compute()["log_r_abs_max"] == 0.0


def test_autocast_is_that_of_the_head(ids):
    input_ids, token_ids = ids
    model = enable_log_probs(make("qwen3"))
    seen = []
    model.lm_head.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].detach()))
    with torch.autocast("cpu", torch.bfloat16):
        log_probs = model(input_ids, token_ids=token_ids).log_probs
    hidden, weight = seen[0].bfloat16(), model.lm_head.weight.bfloat16()
    assert torch.equal(log_probs, linear_token_logprobs(hidden, weight, token_ids))
    assert not torch.equal(log_probs, model(input_ids, token_ids=token_ids).log_probs)


def test_what_else_the_model_returns_stays(ids):
    input_ids, token_ids = ids
    model = enable_log_probs(make("qwen3_moe"))
    options = {"output_router_logits": True, "output_hidden_states": True}
    output, expected = model(input_ids, token_ids=token_ids, **options), model(input_ids, **options)
    assert set(output.keys()) == {*expected.keys(), "log_probs", "entropy"} - {"logits"}
    assert torch.equal(output.aux_loss, expected.aux_loss)
    assert len(output.hidden_states) == len(expected.hidden_states) == 3


def test_generate_makes_logits_of_the_last_position_only(ids):
    input_ids, _ = ids
    untouched, model = make("qwen3"), enable_log_probs(make("qwen3"))
    assert inspect.signature(model.forward) == inspect.signature(untouched.forward)
    shapes = []
    model.lm_head.register_forward_hook(lambda module, arguments, logits: shapes.append(tuple(logits.shape)))
    options = {"do_sample": False, "max_new_tokens": 3, "min_new_tokens": 3}
    assert torch.equal(model.generate(input_ids, **options), untouched.generate(input_ids, **options))
    assert shapes == [(3, 1, V)] * 3


def test_a_copy_computes_with_its_own_weights(ids):
    input_ids, token_ids = ids
    model = enable_log_probs(make("qwen3"))
    before = model(input_ids, token_ids=token_ids).log_probs
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
        other.model.norm.weight.mul_(2)
    assert torch.equal(model(input_ids, token_ids=token_ids).log_probs, before)
    after = token_logprobs(other(input_ids).logits, token_ids)
    torch.testing.assert_close(other(input_ids, token_ids=token_ids).log_probs, after)


def test_gradient_checkpointing(ids, policy_loss):
    input_ids, token_ids = ids
    model = enable_log_probs(make("qwen3_moe"))
    found = []
    for _ in range(2):
        model.zero_grad()
        model(input_ids, token_ids=token_ids, policy_loss=policy_loss, use_cache=False).loss.backward()
        found.append(copy.deepcopy(gradients(model)))
        model.gradient_checkpointing_enable()
        model.train()
    assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())


@pytest.mark.usefixtures("cpu")
def test_compile(ids):
    input_ids, token_ids = ids
    model = enable_log_probs(make("granite"))
    model(input_ids, token_ids=token_ids).log_probs.sum().backward()
    expected = copy.deepcopy(gradients(model))
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            model.zero_grad()
            compiled(input_ids, token_ids=token_ids, use_cache=False).log_probs.sum().backward()
    torch.compiler.reset()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[name])


def test_twice_is_once_and_randomness_is_left_alone(ids):
    input_ids, token_ids = ids
    model = make("gpt2").train()  # with dropout
    before = torch.get_rng_state()
    assert enable_log_probs(enable_log_probs(model)) is model
    assert torch.equal(torch.get_rng_state(), before)
    assert model(input_ids, token_ids=token_ids).log_probs.shape == token_ids.shape


@pytest.mark.usefixtures("cpu")
def test_fsdp(tmp_path):
    sharded_model.run(tmp_path)


def test_peft(ids):
    peft = pytest.importorskip("peft")
    input_ids, token_ids = ids
    lora = {"r": 2, "init_lora_weights": False}
    model = peft.get_peft_model(make("qwen3"), peft.LoraConfig(target_modules=["q_proj"], **lora))
    expected = token_logprobs(model(input_ids).logits, token_ids)
    log_probs = enable_log_probs(model)(input_ids=input_ids, token_ids=token_ids).log_probs
    torch.testing.assert_close(log_probs, expected)
    log_probs.sum().backward()
    assert gradients(model).keys() == {name for name, _ in model.named_parameters() if "lora" in name}


def then(change):
    """A model whose forward applies change(model, logits) at its end."""
    model = make("qwen3")
    base = type(model)

    class Changed(base):
        def forward(self, *args, **kwargs):
            output = base.forward(self, *args, **kwargs)
            output.logits = change(self, output.logits)
            return output

    model.__class__ = Changed
    return model


def with_scale():
    model = then(lambda model, logits: logits * model.scale)
    model.scale = nn.Parameter(torch.tensor(0.5))
    return model


def with_head(head):
    model = make("qwen3")
    model.lm_head = head
    return model


class OtherLinear(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


def with_unused_head():
    model = make("qwen3")
    model.get_output_embeddings = lambda: nn.Linear(32, V)
    return model


REFUSED = {
    "model is a Linear: it must be a causal": (TypeError, lambda: nn.Linear(3, 3)),
    "are a Sequential: they must be an nn.Linear": (TypeError, lambda: with_head(nn.Sequential(nn.Linear(32, V)))),
    "are a OtherLinear: they must be an nn.Linear": (TypeError, lambda: with_head(OtherLinear(32, V))),
    "are on the meta device": (ValueError, lambda: make("qwen3").to("meta")),
    "scales its logits by a parameter": (ValueError, with_scale),
    "does not call its output embeddings": (ValueError, with_unused_head),
    "calls its output embeddings more than once": (
        ValueError,
        lambda: then(lambda model, logits: logits + model.lm_head(torch.ones(1, 1, 32))),
    ),
}
UNKNOWN = {
    "a shift": lambda model, logits: logits + 1,
    "a power": lambda model, logits: logits * logits.abs(),
    "a sign": lambda model, logits: -logits,
    "a clamp": lambda model, logits: logits.clamp(-20, 20),
    "a slice": lambda model, logits: logits[..., : V - 3],
    "one token": lambda model, logits: logits.index_fill(-1, torch.tensor([5]), -1e9),
    "a normalisation": lambda model, logits: logits.log_softmax(-1),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_refused(message):
    error, build = REFUSED[message]
    with pytest.raises(error, match=message):
        enable_log_probs(build())


@pytest.mark.parametrize("change", UNKNOWN)
def test_unknown_changes_of_the_logits_are_refused(change, ids):
    model = then(UNKNOWN[change])
    before = model(ids[0]).logits
    with pytest.raises(ValueError, match="Changed does more to its logits after its head than a positive scale and"):
        enable_log_probs(model)
    assert torch.equal(model(ids[0]).logits, before)
    assert "forward" not in vars(model.lm_head)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.ones(3, 7, dtype=torch.long)}, "labels is given with token_ids"),
        ({"token_ids": None, "policy_loss": {}}, "policy_loss is given without token_ids"),
    ],
)
def test_arguments_that_do_not_go_together(ids, changes, message):
    input_ids, token_ids = ids
    model = enable_log_probs(make("qwen3"))
    with pytest.raises(ValueError, match=message):
        model(input_ids, **{"token_ids": token_ids, **changes})


def test_a_head_that_came_later_is_told(ids):
    input_ids, token_ids = ids
    model = enable_log_probs(make("qwen3"))
    model.resize_token_embeddings(V + 3)
    with pytest.raises(ValueError, match="the output embeddings were replaced after enable_log_probs"):
        model(input_ids, token_ids=token_ids)


def test_an_error_leaves_the_model_as_it_was(ids):
    input_ids, token_ids = ids
    model = enable_log_probs(make("qwen3"))
    with pytest.raises(IndexError):
        model(input_ids + V, token_ids=token_ids)
    with pytest.raises(ValueError, match="token_ids"):
        model(input_ids, token_ids=token_ids + V)
    assert model(input_ids).logits.shape == (3, 7, V)
