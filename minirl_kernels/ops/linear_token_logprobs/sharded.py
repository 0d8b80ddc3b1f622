"""A vocabulary split over a process group: combines the results of the shards to results of the whole vocabulary.

Rank i has shift m_i, log-sum l_i and entropy H_i; m is the largest shift, q_i the rank's share of the probability:
    log_sum = log sum_i exp(l_i + (m_i - m) / temperature)
    entropy = log_sum - sum_i q_i ((m_i - m) / temperature + l_i - H_i)
The ranks exchange O(tokens) numbers and no logits.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ...common.checks import IGNORE_INDEX

ELSEWHERE = -1  # the kernels' id for a token that counts and is in another shard


class Shard:
    """The shard of this rank. Shards have any size and are in the order of the ranks. One collective finds the sizes.

    size: number of ids in this shard. first: id of the first one. vocab_size: number of ids in all shards. first and
        vocab_size are int64 scalar tensors, so that the host does not wait for the collective.
    """

    def __init__(self, group: dist.ProcessGroup, size: int, device: torch.device):
        self.group, self.size = group, size
        rank = dist.get_rank(group)
        sizes = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=device)
        sizes[rank] = size
        dist.all_reduce(sizes, group=group)
        self.first, self.vocab_size = sizes[:rank].sum(), sizes.sum()

    def local_ids(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(bool: the token is in this shard; ids within the shard, 0 for a token of another shard)."""
        local = token_ids - self.first
        here = (local >= 0) & (local < self.size)
        return here, local.where(here, 0).masked_fill(token_ids == IGNORE_INDEX, IGNORE_INDEX)

    def ids_or_elsewhere(self, token_ids: Tensor) -> Tensor:
        here, local = self.local_ids(token_ids)
        return local.where(here | (token_ids == IGNORE_INDEX), ELSEWHERE)

    def local_kept(self, kept_ids: Tensor | None) -> Tensor | None:
        """Ids of kept tokens relative to the first id of this shard. Tokens of other shards are out of range."""
        return None if kept_ids is None else kept_ids - self.first

    def combine(
        self,
        log_probs: Tensor,
        entropy: Tensor,
        shift: Tensor,
        log_sum: Tensor,
        token_ids: Tensor,
        temperature: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same four tensors [T] over the whole vocabulary; entropy may be empty. It takes two collectives."""
        largest = shift.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        # if all logits of a shard are -inf, its probability is 0, and its shift is -inf or the lowest number
        empty = (shift == -torch.inf) | (log_sum == -torch.inf)
        fall = torch.where(empty, -torch.inf, (shift.double() - largest.double()) / temperature)
        log_share = log_sum.double() + fall
        mean = torch.where(fall == -torch.inf, 0.0, log_share - entropy if entropy.numel() else log_share)
        share = torch.where(fall == -torch.inf, 0.0, log_share.exp())
        here, _ = self.local_ids(token_ids)
        target = torch.where(here, log_probs.double() + log_share, 0.0)
        sums = torch.stack([share, share * mean, target])
        dist.all_reduce(sums, group=self.group)
        total, weighted, target = sums
        log_total = total.log()
        ignored = token_ids == IGNORE_INDEX
        # an id that no shard has
        invalid = ~ignored & ((token_ids < 0) | (token_ids >= self.vocab_size))
        log_prob, log_sum, mean = (
            values.masked_fill(ignored, 0.0).masked_fill(invalid, torch.nan).float()
            for values in (target - log_total, log_total, weighted / total)
        )
        return log_prob, (log_sum - mean if entropy.numel() else entropy), largest, log_sum

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks, in float32."""
        total = values.float()
        total = total.clone() if total is values else total
        dist.all_reduce(total, group=self.group)
        return total.to(values.dtype)
