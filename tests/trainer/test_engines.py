"""A rollout engine of one's own: a module beside the others, called as `rollout.engine` calls it."""

import sys
from dataclasses import replace
from types import ModuleType

import pytest
from minirl.discrepancy.settings import InferenceSettings
from minirl.errors import MiniRLError
from minirl.rollout import TransformersEngine
from minirl.run_dir import RunDir

from minirl_kernels import PolicyLossConfig


class Recording(TransformersEngine):
    """The embedded engine, which notes how often it samples."""

    calls = 0

    def generate(self, *arguments, **options):
        Recording.calls += 1
        return super().generate(*arguments, **options)


@pytest.fixture
def requests(monkeypatch):
    """The requests that the module `minirl.rollout.recording` was given."""
    found = []

    def make_engine(request):
        found.append(request)
        return Recording(
            request.config,
            dtype=request.dtype,
            pad_token_id=request.pad_token_id,
            eos_token_ids=request.eos_token_ids,
        )

    module = ModuleType("minirl.rollout.recording")
    module.make_engine = make_engine
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(Recording, "calls", 0)
    return found


def test_the_trainer_samples_with_it(config, make_trainer, requests):
    trainer = make_trainer(
        config,
        rollout=replace(config.rollout, engine="recording", dtype="bfloat16"),
        policy_loss=PolicyLossConfig(loss_agg_mode="token-mean"),
    )
    trainer.step(1)
    (request,) = requests
    assert (request.dtype, request.records_routing, request.batch_invariant) == ("bfloat16", False, False)
    assert request.log.parent == RunDir(request.log.parent).path
    assert str(request.log.parent) == config.run_dir
    assert Recording.calls == 1


def test_the_report_refuses_it_by_name():
    with pytest.raises(MiniRLError, match=r"--mu\.engine is 'recording': it must be transformers or vllm"):
        InferenceSettings(engine="recording").check()
