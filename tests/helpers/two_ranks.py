"""The work of each of two processes in a test of collectives; a spawned process imports this module by name."""

import torch
from policy_batches import LENGTHS, random_batch

from minirl_kernels import PolicyLossConfig, policy_loss


def metrics_of(batch, config=PolicyLossConfig(), layout="packed", **changes):
    arguments = {**batch.arguments(layout), **changes}
    log_probs, entropy = (batch.lay_out(values, layout) for values in (batch.log_probs, batch.entropy))
    return policy_loss(log_probs, **{"entropy": entropy, "config": config, **arguments}).metrics


def reduce_a_part(rank, path):
    batch = random_batch(LENGTHS)
    part = metrics_of(batch.responses(*((0, 2), (2, 6))[rank]))
    before = part.sums.clone()
    reduced = part.all_reduce()
    assert torch.equal(part.sums, before)
    torch.save({"sums": reduced.sums, "maxima": reduced.maxima}, path / f"{rank}.pt")
