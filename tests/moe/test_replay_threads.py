"""record_routing and replay_routing hold for the thread that entered them, and leave nothing on the model."""

import copy
import threading

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from tiny_moe import gates, random_experts, tiny, token_ids

from minirl_kernels import record_routing, replay_routing

pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning"),
]


def in_a_thread(function):
    """The result of the function, or its exception."""
    result = []

    def run():
        try:
            result.append(function())
        except BaseException as error:
            result.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(result[0], BaseException):
        raise result[0]
    return result[0]


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids).logits


def hooks_on(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_a_thread_that_shares_the_model_routes_naturally():
    model, ids, other = tiny("Qwen3Moe"), token_ids(), token_ids(3, 4, seed=1)
    natural = logits_of(model, other)
    with replay_routing(model, random_experts(model, ids.numel())):
        expected = logits_of(model, ids)
    with replay_routing(model, random_experts(model, ids.numel())):
        assert torch.equal(in_a_thread(lambda: logits_of(model, other)), natural)
        assert torch.equal(logits_of(model, ids), expected)
    with record_routing(model) as record:
        in_a_thread(lambda: logits_of(model, other))
        logits_of(model, ids)
    assert record.routed_experts.num_tokens == ids.numel()


def test_two_threads_replay_the_same_model():
    model, ids = tiny("Qwen3Moe"), [token_ids(), token_ids(3, 4, seed=1)]
    routed = [random_experts(model, one.numel(), seed) for seed, one in enumerate(ids)]

    def replayed(number):
        with replay_routing(model, routed[number]):
            return logits_of(model, ids[number])

    expected = [replayed(0), replayed(1)]
    with replay_routing(model, routed[0]):
        assert torch.equal(in_a_thread(lambda: replayed(1)), expected[1])
        assert torch.equal(logits_of(model, ids[0]), expected[0])
    assert hooks_on(model) == 0


def test_a_forward_that_runs_in_another_thread_only():
    """As with a streamer: the context belongs to this thread, and must not be ignored silently."""
    model, ids = tiny("Qwen3Moe"), token_ids()
    with (
        pytest.raises(RuntimeError, match="replay_routing: the model ran in another thread only"),
        replay_routing(model, random_experts(model, ids.numel())),
    ):
        in_a_thread(lambda: logits_of(model, ids))


def test_the_backward_of_another_thread_replays_its_recompute():
    """Autograd passes the contexts to every thread that computes a gradient."""
    model, ids = tiny("Qwen3Moe"), token_ids()
    routed = random_experts(model, ids.numel())

    def gradients():
        model.zero_grad()
        with replay_routing(model, routed):
            model(ids).logits.logsumexp(-1).mean().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with replay_routing(model, random_experts(model, ids.numel(), 5)):
        logits_of(model, ids)
        grads = in_a_thread(gradients)
    assert all(torch.equal(one, other) for one, other in zip(grads, expected, strict=True))


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "not reentrant", "reentrant"])
@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_forwards_without_gradients_leave_no_hook(without, reentrant):
    model, ids = tiny("Qwen3Moe"), token_ids()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    before = hooks_on(model)
    for _ in range(2):
        with without(), record_routing(model):
            model(ids)
        with without(), replay_routing(model, random_experts(model, ids.numel())):
            model(ids)
    assert hooks_on(model) == before


def test_an_error_in_the_forward_leaves_nothing():
    model, ids = tiny("Qwen3Moe"), token_ids()
    natural = logits_of(model, ids)
    broken = model.model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
    for context in (record_routing(model), replay_routing(model, random_experts(model, ids.numel()))):
        with pytest.raises(ZeroDivisionError), context:
            model(ids)
    broken.remove()
    assert hooks_on(model) == 0
    assert torch.equal(logits_of(model, ids), natural)
    with record_routing(model) as record:
        logits_of(model, ids)
    assert record.routed_experts.num_missing() == 0


def test_generation_leaves_nothing():
    model, prompt = tiny("Qwen3Moe").eval(), token_ids(2, 5)
    with torch.no_grad(), record_routing(model):
        model.generate(prompt, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert hooks_on(model) == 0


def test_a_copy_that_is_made_inside_routes_naturally():
    model, ids = tiny("Qwen3Moe"), token_ids()
    natural = logits_of(model, ids)
    with replay_routing(model, random_experts(model, ids.numel())):
        twin = copy.deepcopy(model)
        assert torch.equal(logits_of(twin, ids), natural)
        logits_of(model, ids)
    assert torch.equal(logits_of(twin, ids), natural)
    assert not any(gate._forward_hooks for gate in gates(model))
