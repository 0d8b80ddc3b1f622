"""A vocabulary split over a process group: what each rank knows of a row, made into what all of them know.

With a rank's shift m_i, log-sum l_i and entropy H_i, and m the largest of the shifts:
    log_sum = log sum_i exp(l_i + (m_i - m) / temperature)
    entropy = log_sum - sum_i q_i ((m_i - m) / temperature + l_i - H_i),   q_i the rank's share of the probability
All of it is O(tokens); a rank's logits stay with it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ...common.checks import IGNORE_INDEX

ELSEWHERE = -1  # what the kernels take for an id that counts and is in another shard


class Shard:
    """This rank's part of the vocabulary: parts of any sizes, in the order of the ranks. One collective to learn them.

    first, vocab_size: int64 tensors of one number, so that no host waits for the collective.
    """

    def __init__(self, group: dist.ProcessGroup, size: int, device: torch.device):
        self.group, self.size = group, size
        rank = dist.get_rank(group)
        sizes = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=device)
        sizes[rank] = size
        dist.all_reduce(sizes, group=group)
        self.first, self.vocab_size = sizes[:rank].sum(), sizes.sum()

    def local_ids(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(whose token is in this shard, ids for the forward: any logit will do for the others)."""
        local = token_ids - self.first
        here = (local >= 0) & (local < self.size)
        return here, local.where(here, 0).masked_fill(token_ids == IGNORE_INDEX, IGNORE_INDEX)

    def ids_or_elsewhere(self, token_ids: Tensor) -> Tensor:
        here, local = self.local_ids(token_ids)
        return local.where(here | (token_ids == IGNORE_INDEX), ELSEWHERE)

    def local_kept(self, kept_ids: Tensor | None) -> Tensor | None:
        """Ids of kept tokens, counted from this shard on; those of other shards are out of its range."""
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
        """Each [T], of the shard -> of the vocabulary; entropy may be empty. Two collectives."""
        largest = shift.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        # a shard of -inf alone has no probability, and no shift to speak of: -inf or the lowest number, and that
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
