"""record_routing and replay_routing on tiny models of transformers: bits, gradients, checkpointing, and misuse."""

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from policy_batches import SLACK
from tiny_moe import CONFIGS, gates, gradients, random_experts, tiny, token_ids
from torch.utils.checkpoint import checkpoint

from minirl_kernels import RoutedExperts, record_routing, replay_routing

# warnings of gradient_checkpointing_enable, and of a checkpointed forward without gradients
pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning"),
]

CHECKPOINTING = {"not reentrant": False, "reentrant": True}


def loss_of(model, ids):
    """A loss for which every parameter has a gradient."""
    return torch.log_softmax(model(ids).logits.float(), -1).gather(-1, ids.roll(-1, 1)[..., None]).mean()


def recorded(model, ids):
    with torch.no_grad(), record_routing(model) as record:
        model(ids)
    return record.routed_experts


def drift(model, amount=0.5):
    """Changes the routers, as updates do."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for gate in gates(model):
            gate.weight.add_(amount * torch.randn(gate.weight.shape, generator=generator))


def experts_used(model):
    """(handles, arguments of each layer's experts)."""
    used = []
    blocks = [module for module in model.modules() if isinstance(getattr(module, "experts", None), torch.nn.Module)]
    hooks = [
        block.experts.register_forward_pre_hook(lambda _, inputs: used.append((inputs[1].clone(), inputs[2].detach())))
        for block in blocks
    ]
    return hooks, used


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_replay_of_a_record_under_the_same_weights_changes_no_bit(name, dtype):
    model, ids = tiny(name).to(dtype), token_ids()
    with torch.no_grad():
        plain = model(ids).logits
    with record_routing(model) as record:
        loss = loss_of(model, ids)
        natural = gradients(model, loss)
    routed = record.routed_experts
    assert routed.num_missing() == 0
    assert routed.experts.shape[:2] == (ids.numel(), len(gates(model)))
    with replay_routing(model, routed) as replay:
        again = loss_of(model, ids)
        replayed = gradients(model, again)
    assert torch.equal(loss, again)
    assert natural.keys() == replayed.keys()
    assert all(torch.equal(natural[key], replayed[key]) for key in natural)
    assert bool((replay.agreement == 1).all())
    with torch.no_grad(), record_routing(model):
        logits = model(ids).logits
    if dtype == torch.float32:  # in bfloat16 transformers breaks ties differently
        assert (logits - plain).abs().max() <= 4 * SLACK * plain.abs().max()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain)  # no hook is left


@pytest.mark.parametrize("name", CONFIGS)
def test_replay_after_drift_follows_the_record_and_trains_the_gate(name):
    model, ids = tiny(name), token_ids()
    routed = recorded(model, ids)
    drift(model)
    with replay_routing(model, routed) as replay:
        hooks, used = experts_used(model)
        grads = gradients(model, loss_of(model, ids))
        [hook.remove() for hook in hooks]
    for layer, (experts, _) in enumerate(used):
        assert torch.equal(experts, routed.experts[:, layer].long())
    assert replay.agreement.shape == replay.mass.shape == replay.margin.shape == (ids.numel(), routed.num_layers)
    assert 0 < replay.agreement.mean() < 1
    for key, grad in grads.items():
        if key.endswith(("gate.weight", "router.weight")):
            assert grad.isfinite().all()
            assert bool((grad != 0).any())


def test_weights_are_those_of_the_current_logits():
    """The weights follow transformers' formula at the replayed experts."""
    model, ids = tiny("Qwen3Moe"), token_ids()
    routed = random_experts(model, ids.numel())
    with replay_routing(model, routed):
        hooks, used = experts_used(model)
        seen = []
        hooks += [gate.register_forward_hook(lambda _, __, out: seen.append(out[0].detach())) for gate in gates(model)]
        loss_of(model, ids)
        [hook.remove() for hook in hooks]
    for (experts, weights), logits in zip(used, seen, strict=True):
        p = torch.softmax(logits.double(), -1).gather(1, experts)
        torch.testing.assert_close(weights.double(), p / p.sum(-1, keepdim=True), rtol=1e-6, atol=1e-7)


def test_the_gradient_of_the_gate_is_that_of_finite_differences():
    model, ids = tiny("Qwen3Moe"), token_ids()
    routed = random_experts(model, ids.numel())
    gate = gates(model)[1]
    direction = torch.randn(gate.weight.shape, generator=torch.Generator().manual_seed(0))
    with replay_routing(model, routed):
        grads = gradients(model, loss_of(model, ids))
    slope = (grads["model.layers.1.mlp.gate.weight"] * direction).sum()
    losses = []
    with torch.no_grad():
        for step in (1e-2, -2e-2):
            gate.weight.add_(step * direction)
            with replay_routing(model, routed):
                losses.append(loss_of(model, ids).double())
    numeric = (losses[0] - losses[1]) / 2e-2
    torch.testing.assert_close(numeric.float(), slope, rtol=2e-2, atol=1e-6)


def test_replayed_experts_whose_probabilities_underflow():
    model, ids = tiny("Qwen3Moe"), token_ids()
    with torch.no_grad():
        for gate in gates(model):
            gate.weight.mul_(2000)
    routed = random_experts(model, ids.numel())
    with replay_routing(model, routed) as replay:
        hooks, used = experts_used(model)
        grads = gradients(model, loss_of(model, ids))
        [hook.remove() for hook in hooks]
    assert bool((replay.mass == 0).any())
    for _, weights in used:
        torch.testing.assert_close(weights.sum(-1), torch.ones(ids.numel()))
    assert all(grad.isfinite().all() for grad in grads.values())


def test_tokens_that_are_not_valid_route_naturally():
    """A token that is not valid in a layer routes there as if its natural experts were recorded."""
    model, ids = tiny("Qwen3Moe"), token_ids()
    routed = random_experts(model, ids.numel())
    valid = torch.rand(routed.valid.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    holed = RoutedExperts(routed.experts.masked_fill(~valid[..., None], 0), valid, routed.num_experts)
    with torch.no_grad(), replay_routing(model, holed) as replay:
        hooks, used = experts_used(model)
        logits = model(ids).logits
        [hook.remove() for hook in hooks]
    effective = torch.stack([experts for experts, _ in used], 1)
    assert torch.equal(effective[valid], routed.experts[valid].long())
    assert bool((replay.agreement[~valid] == 1).all())
    with torch.no_grad(), replay_routing(model, RoutedExperts.from_ids(effective, num_experts=8)):
        assert torch.equal(model(ids).logits, logits)


def test_rows_follow_the_flattened_batch():
    """Rows of a padded mini-batch keep their sequences; swapped sequences would change the experts."""
    model, ids = tiny("Qwen3Moe"), token_ids(3, 7)
    routed = RoutedExperts.pad([recorded(model, row[None]) for row in ids])
    drift(model)
    with torch.no_grad(), replay_routing(model, routed):
        together = model(ids).logits
    for row in range(3):
        with torch.no_grad(), replay_routing(model, routed[row]):
            torch.testing.assert_close(model(ids[row][None]).logits[0], together[row], rtol=1e-4, atol=1e-6)
    with torch.no_grad(), replay_routing(model, routed[torch.tensor([1, 0, 2])]):
        assert (model(ids).logits[:2] - together[:2]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["Qwen3Moe", "DeepseekV3", "GptOss"])
@pytest.mark.parametrize("reentrant", CHECKPOINTING.values(), ids=CHECKPOINTING)
def test_gradient_checkpointing_replays_the_same_rows(name, reentrant):
    model, ids = tiny(name), token_ids()
    routed = random_experts(model, ids.numel())
    with replay_routing(model, routed):
        expected = gradients(model, loss_of(model, ids))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    calls = []
    handle = gates(model)[0].register_forward_hook(lambda *_: calls.append(1))
    with replay_routing(model, routed):
        grads = gradients(model, loss_of(model, ids))
    handle.remove()
    assert len(calls) == 2
    assert grads.keys() == expected.keys()
    assert all(torch.equal(grads[key], expected[key]) for key in expected)
    assert not any(gate._forward_hooks for gate in gates(model))


@pytest.mark.parametrize("reentrant", CHECKPOINTING.values(), ids=CHECKPOINTING)
@pytest.mark.parametrize("context", ["record", "replay"])
def test_a_recompute_after_the_context_raises(context, reentrant):
    model, ids = tiny("Qwen3Moe"), token_ids()
    routed = random_experts(model, ids.numel())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with record_routing(model) if context == "record" else replay_routing(model, routed):
        loss = loss_of(model, ids)
    with torch.no_grad():
        model(ids)  # another forward in between must not hide the error
    with pytest.raises(RuntimeError, match=rf"mlp\.gate is computed again .* after its {context}_routing has ended"):
        loss.backward()
    # later forwards work, natural and replayed
    expected = gradients(model, loss_of(model, ids))
    assert all(grad.isfinite().all() for grad in expected.values())
    with replay_routing(model, routed):
        gradients(model, loss_of(model, ids))


@pytest.mark.parametrize("reentrant", CHECKPOINTING.values(), ids=CHECKPOINTING)
def test_a_recompute_of_a_forward_from_before_the_context_raises(reentrant):
    model, ids = tiny("Qwen3Moe"), token_ids()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    loss = loss_of(model, ids)
    with (
        pytest.raises(RuntimeError, match="inside a replay_routing, but its forward ran outside"),
        replay_routing(model, random_experts(model, ids.numel())),
    ):
        loss.backward()


def test_a_backward_without_checkpointing_may_come_after_the_context():
    model, ids = tiny("Qwen3Moe"), token_ids()
    routed = random_experts(model, ids.numel())
    with replay_routing(model, routed):
        expected = gradients(model, loss_of(model, ids))
    with replay_routing(model, routed):
        loss = loss_of(model, ids)
    assert not any(gate._forward_hooks for gate in gates(model))
    grads = gradients(model, loss)
    assert all(torch.equal(grads[key], expected[key]) for key in expected)


def test_a_part_of_the_model_under_checkpointing():
    """torch's checkpoint function around one layer, instead of transformers' switch."""
    model, ids = tiny("Mixtral"), token_ids()
    routed = random_experts(model, ids.numel())
    with replay_routing(model, routed):
        expected = gradients(model, loss_of(model, ids))
    layer = model.model.layers[1]
    plain = layer.forward
    layer.forward = lambda *args, **kwargs: checkpoint(plain, *args, use_reentrant=False, **kwargs)
    with replay_routing(model, routed):
        grads = gradients(model, loss_of(model, ids))
    assert all(torch.equal(grads[key], expected[key]) for key in expected)


@pytest.mark.parametrize("reentrant", CHECKPOINTING.values(), ids=CHECKPOINTING)
def test_a_recompute_is_not_recorded_again(reentrant):
    model, ids = tiny("Qwen3Moe"), token_ids()
    with record_routing(model) as record:
        expected = gradients(model, loss_of(model, ids))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with record_routing(model) as checkpointed:
        grads = gradients(model, loss_of(model, ids))
    assert torch.equal(checkpointed.routed_experts.experts, record.routed_experts.experts)
    assert all(torch.equal(grads[key], expected[key]) for key in expected)


def test_two_passes_of_r2():
    """The pass for old_log_probs records and the update replays; log r is exactly 0 before the update."""
    model, ids = tiny("Qwen3Moe"), token_ids()
    with torch.no_grad(), record_routing(model) as record:
        old = torch.log_softmax(model(ids).logits, -1)
    with replay_routing(model, record.routed_experts):
        assert (torch.log_softmax(model(ids).logits, -1) - old).abs().max() == 0


@pytest.mark.parametrize("name", ["Qwen3Moe", "GptOss"])
def test_generation_is_recorded_token_by_token(name):
    """The forward of a prompt and of each new token give T - 1 rows, as engines return, for one replay."""
    model, prompt = tiny(name).eval(), token_ids(3, 5)
    with torch.no_grad(), record_routing(model) as record:
        ids = model.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    assert len(record.forwards) == 4
    routed = record.sequences(3)
    assert routed.experts.shape[:3] == (3, ids.shape[1] - 1, len(gates(model)))
    with torch.no_grad(), replay_routing(model, routed) as replay:
        whole = model(ids[:, :-1]).logits
    assert replay.agreement.mean() > 0.99
    assert torch.equal(whole[:, 4:].argmax(-1), ids[:, 5:])
    with pytest.raises(RuntimeError, match="saw 4 forwards: use sequences"):
        _ = record.routed_experts
    with pytest.raises(ValueError, match="batch_size is 2: it must divide the 15 rows of forward 0"):
        record.sequences(2)


def test_more_than_256_experts():
    model, ids = tiny("Qwen3Moe", num_experts=300, num_experts_per_tok=5), token_ids()
    routed = recorded(model, ids)
    assert routed.experts.dtype == torch.uint16
    assert routed.experts.long().max() > 255
    drift(model)
    with torch.no_grad(), replay_routing(model, routed):
        hooks, used = experts_used(model)
        model(ids)
        [hook.remove() for hook in hooks]
    assert all(torch.equal(experts, routed.experts[:, layer].long()) for layer, (experts, _) in enumerate(used))


GATE = r"model\.layers\.0\.mlp\.gate"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda r: RoutedExperts(r.experts[:, :2], r.valid[:, :2], 8),
            f"has 2 layers: the model has 3 routers, {GATE} to",
        ),
        (lambda r: RoutedExperts(r.experts[..., :1], r.valid, 8), f"has 1 experts per token: {GATE} has 2"),
        (lambda r: RoutedExperts(r.experts, r.valid, 16), f"has 16 experts to choose from: {GATE} has 8"),
    ],
    ids=["layers", "K", "experts"],
)
def test_routed_experts_of_another_model(change, said):
    model, ids = tiny("Qwen3Moe"), token_ids()
    with (
        pytest.raises(ValueError, match=rf"^routed_experts {said}"),
        replay_routing(model, change(random_experts(model, ids.numel()))),
    ):
        pass


@pytest.mark.parametrize("tokens", [17, 19])
def test_rows_of_another_batch(tokens):
    model, ids = tiny("Qwen3Moe"), token_ids()
    with (
        pytest.raises(ValueError, match=rf"has {tokens} tokens: model\.layers\.0\.mlp\.gate was given 18"),
        replay_routing(model, random_experts(model, tokens)),
    ):
        model(ids)


def test_one_replay_is_one_forward():
    model, ids = tiny("Qwen3Moe"), token_ids()
    with (
        torch.no_grad(),
        replay_routing(model, random_experts(model, ids.numel())),
    ):
        model(ids)
        with pytest.raises(RuntimeError, match=r"layers\.0\.mlp\.gate runs a second time: one replay_routing covers"):
            model(ids)


def test_contexts_do_not_nest():
    model, ids = tiny("Qwen3Moe"), token_ids()
    with (
        record_routing(model),
        pytest.raises(RuntimeError, match="is inside record_routing already: replay_routing must not be nested"),
        replay_routing(model, random_experts(model, ids.numel())),
    ):
        pass
    with torch.no_grad(), record_routing(model) as record:
        model(ids)
    assert len(record.forwards) == 1


def test_an_error_inside_leaves_nothing_behind():
    model, ids = tiny("Qwen3Moe"), token_ids()
    with pytest.raises(IndexError), replay_routing(model, random_experts(model, ids.numel())):
        gradients(model, loss_of(model, ids)[1])
    assert not any(gate._forward_hooks for gate in gates(model))


def test_a_router_that_is_never_called_is_named():
    model, ids = tiny("Qwen3Moe"), token_ids()
    model.model.layers[1].mlp.forward = lambda hidden: hidden
    with (
        pytest.raises(RuntimeError, match=r"replay_routing: the forward left out model\.layers\.1\.mlp\.gate"),
        replay_routing(model, random_experts(model, ids.numel())),
    ):
        model(ids)


def test_asked_before_anything_ran():
    model, ids = tiny("Qwen3Moe"), token_ids()
    with record_routing(model) as record, pytest.raises(RuntimeError, match="saw no forward"):
        _ = record.routed_experts
    with (
        pytest.raises(RuntimeError, match=r"saw no forward through model\.layers\.0\.mlp\.gate"),
        replay_routing(model, random_experts(model, ids.numel())) as replay,
    ):
        _ = replay.agreement
    with (
        pytest.raises(TypeError, match="routed_experts is a Tensor: it must be RoutedExperts"),
        replay_routing(model, ids),
    ):
        pass
