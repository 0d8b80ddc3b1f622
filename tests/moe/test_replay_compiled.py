"""record_routing and replay_routing with torch.compile before, inside and after the context."""

import copy

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from tiny_moe import gates, tiny, token_ids

from minirl_kernels import RoutedExperts, batch_invariant_mode, record_routing, replay_routing

pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning"),
]


def whole(model, **options):
    return torch.compile(model, **options)


def in_place(model, **options):
    model.compile(**options)
    return model


def function(model, **options):
    return torch.compile(lambda ids: model(ids), **options)


def one_layer(model, **options):
    model.model.layers[1] = torch.compile(model.model.layers[1], **options)
    return model


def each_layer_in_place(model, **options):
    for layer in model.model.layers:
        layer.compile(**options)
    return model


def one_block(model, **options):
    model.model.layers[1].mlp = torch.compile(model.model.layers[1].mlp, **options)
    return model


def one_gate(model, **options):
    model.model.layers[1].mlp.gate = torch.compile(model.model.layers[1].mlp.gate, **options)
    return model


WAYS = (whole, in_place, function, one_layer, each_layer_in_place, one_block, one_gate)


def name_of(value):
    return {True: "compiled before", False: "first run inside"}.get(value) or value.__name__


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model_of_two_layers():
    return tiny("Qwen3Moe", num_hidden_layers=2)


def random_experts(tokens, seed=3):
    ids = torch.rand((tokens, 2, 8), generator=torch.Generator().manual_seed(seed)).argsort(-1)[..., :2]
    return RoutedExperts.from_ids(ids, num_experts=8)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize(
    ("way", "before"), [*((way, True) for way in WAYS), (whole, False), (one_layer, False)], ids=name_of
)
def test_a_compiled_model_is_replayed_and_recorded(way, before):
    """The context gives the bits of the uncompiled model; after it, compiled code routes naturally again."""
    plain, model, ids = model_of_two_layers(), model_of_two_layers(), token_ids()
    routed = random_experts(ids.numel())
    graphs = []
    compiled = way(model, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    natural = plain(ids).logits
    if before:
        assert torch.equal(compiled(ids).logits, natural)
        assert graphs
    count = len(graphs)
    with replay_routing(plain, routed):
        logits = plain(ids).logits
        grads = gradients(plain, logits.logsumexp(-1).mean())
    with replay_routing(model, routed) as replay:
        replayed = compiled(ids).logits
        replayed_grads = gradients(model, replayed.logsumexp(-1).mean())
    assert torch.equal(replayed, logits)
    assert all(torch.equal(one, other) for one, other in zip(replayed_grads, grads, strict=True))
    assert replay.agreement.mean() < 1
    with torch.no_grad(), record_routing(plain) as expected:
        plain(ids)
    with torch.no_grad(), record_routing(model) as record:
        compiled(ids)
    assert torch.equal(record.routed_experts.experts, expected.routed_experts.experts)
    assert len(graphs) == count
    assert torch.equal(compiled(ids).logits, natural)
    assert graphs


def test_with_inductor():
    plain, model, ids = model_of_two_layers(), model_of_two_layers(), token_ids()
    routed = random_experts(ids.numel())
    one_gate(model, backend="inductor")
    with torch.no_grad():
        model(ids)
        with replay_routing(model, routed):
            logits = model(ids).logits
        with replay_routing(plain, routed):
            assert torch.equal(plain(ids).logits, logits)


def test_generation_by_a_compiled_model_is_recorded():
    model, prompt = model_of_two_layers().eval(), token_ids(2, 5)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad(), record_routing(model) as expected:
        model.generate(prompt, **options)
    model.compile(backend="eager")
    with torch.no_grad():
        model.generate(prompt, **options)
        with record_routing(model) as record:
            model.generate(prompt, **options)
    assert torch.equal(record.sequences(2).experts, expected.sequences(2).experts)


@pytest.mark.parametrize("first", ["context", "mode"])
def test_what_is_compiled_stays_aside_until_the_last_of_both_ends(first):
    """batch_invariant_mode also stops compiled code; ending one context must not end this for the other."""
    model, calls = model_of_two_layers(), []
    compiled = torch.compile(lambda x: x + 1, backend=lambda graph, _: calls.append(1) or graph.forward)
    open_ones = [record_routing(model), batch_invariant_mode()]
    [one.__enter__() for one in open_ones]
    ending = open_ones if first == "context" else open_ones[::-1]
    ending[0].__exit__(None, None, None)
    compiled(torch.ones(3))
    assert not calls
    ending[1].__exit__(None, None, None)
    compiled(torch.ones(3))
    assert calls


def test_an_error_inside_lets_compiled_functions_compile_again():
    model, calls = model_of_two_layers(), []
    with pytest.raises(KeyError), record_routing(model):
        raise KeyError("of the caller")
    torch.compile(lambda x: x + 1, backend=lambda graph, _: calls.append(1) or graph.forward)(torch.ones(3))
    assert calls


def test_a_context_inside_a_compiled_function_is_refused():
    model, ids = model_of_two_layers(), token_ids()

    @torch.compile(backend="eager")
    def step(ids):
        with replay_routing(model, random_experts(ids.numel())):
            return model(ids).logits

    with pytest.raises(RuntimeError, match=r"inside a compiled function|in a torch\.compile region"):
        step(ids)


@pytest.mark.parametrize("context", ["record", "replay"])
def test_a_model_whose_forward_is_a_captured_graph(context):
    """The hooks cannot change the routes of a captured graph, so the end of the forward raises an error."""
    model, ids = model_of_two_layers(), token_ids()
    with torch.no_grad():
        output = model(ids)
    model.model.forward = lambda *_, **__: output
    routed = random_experts(ids.numel())
    with (
        pytest.raises(RuntimeError, match=r"_routing: the forward left out model\.layers\.0\.mlp\.gate"),
        record_routing(model) if context == "record" else replay_routing(model, routed),
    ):
        model.model(input_ids=ids)


def test_a_later_forward_that_leaves_a_router_out_is_noticed():
    """The first forward ran all routers, and a later forward leaves one out."""
    model, ids = model_of_two_layers(), token_ids()
    with torch.no_grad(), record_routing(model):
        output = model.model(ids)
        model.model.forward = lambda *_, **__: output
        with pytest.raises(RuntimeError, match=r"left out model\.layers\.0\.mlp\.gate"):
            model(ids)


def test_a_recording_in_which_nothing_runs_is_silent():
    with record_routing(model_of_two_layers()):
        pass


def exported(model, ids):
    return torch.export.export(model, (ids,), {"use_cache": False}, strict=False).module()


@pytest.mark.parametrize("other", [lambda model, _: copy.deepcopy(model), exported], ids=["copy", "exported program"])
def test_a_replay_around_another_model_raises(other):
    """A copy and an exported program do not have the model's hooks, so they would route naturally."""
    model, ids = model_of_two_layers(), token_ids()
    runs = other(model, ids)
    with (
        pytest.raises(
            RuntimeError, match=r"saw no forward through .* a copy or an exported program of it does not count"
        ),
        torch.no_grad(),
        replay_routing(model, random_experts(ids.numel())),
    ):
        runs(ids, use_cache=False)


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.parametrize("way", [one_layer, each_layer_in_place, one_block, in_place], ids=name_of)
def test_checkpointing_of_compiled_layers(way, reentrant):
    """Inside the context, a recompute replays. After it, a recompute of compiled code raises an error."""
    model, ids = model_of_two_layers(), token_ids()
    routed = random_experts(ids.numel())
    with replay_routing(model, routed):
        expected = gradients(model, model(ids).logits.logsumexp(-1).mean())
    way(model, backend="eager")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    gradients(model, model(ids).logits.logsumexp(-1).mean())
    with replay_routing(model, routed):
        grads = gradients(model, model(ids).logits.logsumexp(-1).mean())
    assert all(torch.equal(one, other) for one, other in zip(grads, expected, strict=True))
    with (
        pytest.raises(RuntimeError, match=r"ends before the backward .* would run the compiled"),
        replay_routing(model, routed),
    ):
        model(ids)
    assert not any(gate._forward_hooks for gate in gates(model))
