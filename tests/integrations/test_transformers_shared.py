"""One enabled model in several threads, and its copies in files and other processes."""

import copy
import subprocess
import sys
import threading
from pathlib import Path

import enabled_elsewhere
import pytest
import torch
from causal_models import V, make

from minirl_kernels.integrations.transformers import enable_log_probs

pytestmark = pytest.mark.usefixtures("cpu")


def assert_scored(file, model, ids):
    log_probs, shape, again = torch.load(file, weights_only=False)
    expected = model(ids[0], token_ids=ids[1]).log_probs
    assert torch.equal(log_probs, expected)
    assert torch.equal(again, expected)
    assert shape == (3, 7, V)


def test_a_saved_model_is_loaded_by_another_process(ids, tmp_path):
    model = enable_log_probs(make("qwen3"))
    torch.save((model, *ids), tmp_path / "model.pt")
    script = Path(enabled_elsewhere.__file__)
    subprocess.run([sys.executable, script, tmp_path / "model.pt", tmp_path / "scores.pt"], check=True)
    assert_scored(tmp_path / "scores.pt", model, ids)


def test_a_model_is_sent_to_a_spawned_process(ids, tmp_path):
    model = enable_log_probs(make("qwen3"))
    context = torch.multiprocessing.get_context("spawn")
    process = context.Process(target=enabled_elsewhere.score, args=(model, *ids, tmp_path / "scores.pt"))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert_scored(tmp_path / "scores.pt", model, ids)


def test_threads_that_share_a_model_get_what_each_asked_for(ids):
    """All threads are inside the forward when the first one reaches the head."""
    input_ids, token_ids = ids
    model = enable_log_probs(make("qwen3"))
    ways = {
        "log_probs": lambda: model(input_ids, token_ids=token_ids).log_probs,
        "logits": lambda: model(input_ids).logits,
        "others": lambda: model(input_ids.flip(0), token_ids=token_ids.flip(0), temperature=0.5).log_probs,
    }
    expected = {name: way().detach() for name, way in ways.items()}
    barrier = threading.Barrier(len(ways), timeout=60)

    def meet(module, args):
        barrier.wait()

    handle = model.model.norm.register_forward_pre_hook(meet)
    wrong = []

    def work(name):
        for _ in range(30):
            try:
                values = ways[name]()
                if not torch.equal(values, expected[name]):
                    wrong.append((name, tuple(values.shape)))
            except Exception as error:
                wrong.append((name, repr(error)))
                barrier.abort()

    threads = [threading.Thread(target=work, args=(name,)) for name in ways]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handle.remove()
    assert wrong == []


@pytest.mark.parametrize("compiled", ["the whole model", "its forward", "its head"])
def test_compiled_code_knows_which_call_it_is_in(ids, compiled):
    """A call with token_ids and a call without work in both orders of tracing."""
    input_ids, token_ids = ids
    model = enable_log_probs(make("qwen3", num_hidden_layers=1))
    options = {"use_cache": False}
    expected = model(input_ids, token_ids=token_ids, **options).log_probs.detach(), model(input_ids, **options).logits
    for scores_first in (True, False):
        torch.compiler.reset()
        ours = copy.deepcopy(model)
        how = {"backend": "eager", "fullgraph": True}
        if compiled == "the whole model":
            ours.compile(**how)
        elif compiled == "its head":
            ours.lm_head.compile(**how)
        else:
            ours.forward = torch.compile(ours.forward, **how)
        for scores in (scores_first, not scores_first) * 2:
            if scores:
                torch.testing.assert_close(ours(input_ids, token_ids=token_ids, **options).log_probs, expected[0])
            else:
                torch.testing.assert_close(ours(input_ids, **options).logits, expected[1])
    torch.compiler.reset()
