"""R2 and R3 in a comparison: the engine that replays, and the effect on routers that choose other experts."""

import pytest
import torch
from two_engines import compared, model_of, planted

GATE = "model.layers.1.mlp.gate.weight"


def nudged(weight):
    return weight + 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("decode", [True, False])
def test_r3_takes_away_what_other_experts_do(decode):
    model = model_of("Qwen3Moe")
    settings = {"mu_settings": {"decode": decode}}
    natural = compared(planted(model, GATE, nudged), model, **settings)
    replayed = compared(planted(model, GATE, nudged), model, routing_replay="R3", **settings)
    assert replayed.metrics["discrepancy_kl_k3"] < natural.metrics["discrepancy_kl_k3"]
    # the routing section shows the natural choices of the routers
    assert replayed.routing[1].equal_fraction < 1


def test_r2_replays_in_the_update_alone():
    model = model_of("Qwen3Moe")
    update = planted(model, GATE, nudged)
    natural, r2 = (compared(model, model, updated=update, routing_replay=setting) for setting in ("disabled", "R2"))
    assert natural.metrics["discrepancy_kl_k3"] < 1e-12
    assert r2.metrics["discrepancy_kl_k3"] == 0
    assert r2.metrics["staleness_kl_k3"] < natural.metrics["staleness_kl_k3"]


def test_what_is_replayed_must_be_recorded():
    model = model_of("Qwen3Moe")

    class Forgetful:
        def __init__(self, engine):
            self.model = engine.model
            self._engine = engine

        def generate(self, *arguments, **options):
            responses, scores = self._engine.generate(*arguments, **options)
            return responses, type(scores)(scores.log_probs, scores.logits)

        def score(self, *arguments, **options):
            return self._engine.score(*arguments, **options)

    with pytest.raises(ValueError, match="mu gave no routed_experts"):
        compared(model, model, routing_replay="R3", wrap=Forgetful)
