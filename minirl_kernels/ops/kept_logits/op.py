"""kept_logits: sets all but the kept logits of each row to -inf, so that a softmax is over the kept tokens.

    log p_j = x_j - logsumexp over the kept k of x_k,  and p_j = 0 where j was not kept

This is log_softmax of logits masked with -inf. The gradient outside the set is exactly 0. A row with an empty set
keeps all its bits. Source: "Keep Sampling Mask" of DeepSeek-V3.2 (arXiv 2512.02556).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...common.checks import IGNORE_INDEX, always_looks, check_device, token_id_message
from ...common.library import Op, register, register_check
from ...sampling_mask import SamplingMask, check_sets

OP = Op(__package__)


@dataclass(frozen=True)
class KeptRows:
    """The kept sets of rows of logits: row t has ids[begin[t]:end[t]]."""

    ids: Tensor  # int32 [N], ascending within a set; ids of other shards of the vocabulary are out of range
    begin: Tensor  # int32 [T]
    end: Tensor  # int32 [T]

    @classmethod
    def of(cls, ids: Tensor | None, offsets: Tensor | None) -> KeptRows | None:
        # a copy, so that begin and end have the same alignment
        return None if ids is None else cls(ids, offsets[:-1], offsets[1:].clone())

    def __getitem__(self, rows: Tensor | slice) -> KeptRows:
        return replace(self, begin=self.begin[rows], end=self.end[rows])


def check_kept(
    kept: SamplingMask | None, token_ids: Tensor, vocab_size: int | Tensor, check: bool, backend: str
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(token_ids, ids of the sets or None, offsets of the sets or None), with checked shapes.

    The contents are checked too on the CPU, and on a GPU if `check`. Otherwise a token outside of its own set gets an
    id out of range, so that its results are NaN. The same holds for a token whose set has an id out of range.
    """
    if kept is None:
        return token_ids, None, None
    if not isinstance(kept, SamplingMask):
        raise TypeError(f"kept is a {type(kept).__name__}: it must be a SamplingMask, or None for the whole vocabulary")
    if tuple(kept.shape) != tuple(token_ids.shape):
        raise ValueError(f"kept has the shape {tuple(kept.shape)}: it must be {tuple(token_ids.shape)}, of token_ids")
    check_device("kept", kept, token_ids.device)
    if check or always_looks(token_ids.device, backend):
        if not isinstance(vocab_size, Tensor):
            vocab_size = torch.full((), vocab_size, dtype=torch.int64)
        token_ids = _checked_kept(token_ids, kept.token_ids, kept.offsets, vocab_size)
    else:
        found, within = _in_own_set(token_ids, kept.token_ids, kept.offsets, vocab_size)
        token_ids = token_ids.where((found & within) | (token_ids == IGNORE_INDEX), vocab_size)
    return token_ids, kept.token_ids, kept.offsets


def _in_own_set(token_ids: Tensor, ids: Tensor, offsets: Tensor, vocab_size: int | Tensor) -> tuple[Tensor, Tensor]:
    """Two bool tensors, per row: the token is in its set, or the set is empty; all ids of the set are in range."""
    counts = offsets.diff()
    rows = torch.arange(len(counts), device=ids.device).repeat_interleave(counts, output_size=len(ids))

    def count_per_set(flags: Tensor) -> Tensor:
        sums = torch.cat([counts.new_zeros(1), flags.cumsum(0, dtype=torch.int32)])
        return sums[offsets[1:]] - sums[offsets[:-1]]

    found = (count_per_set(ids == token_ids.flatten()[rows]) > 0) | (counts == 0)
    within = count_per_set((ids < 0) | (ids >= vocab_size)) == 0
    return found.view(token_ids.shape), within.view(token_ids.shape)


def _check_kept(token_ids, ids, offsets, vocab_size):
    vocab_size = vocab_size.item()
    check_sets(ids, offsets)
    counted = token_ids != IGNORE_INDEX
    outside = counted & ((token_ids < 0) | (token_ids >= vocab_size))
    if bool(outside.any()):
        raise ValueError(token_id_message(_first(outside), token_ids, vocab_size))
    found, within = _in_own_set(token_ids, ids, offsets, vocab_size)
    if not bool(within.all()):
        row = _first(~within)
        raise ValueError(
            f"kept has the id {_set_of(row, ids, offsets).max().item()} at row {row}: an id must be below {vocab_size}"
        )
    missing = counted & ~found
    if bool(missing.any()):
        row = _first(missing)
        own = _set_of(row, ids, offsets).tolist()
        raise ValueError(
            f"token_ids has the id {token_ids.flatten()[row].item()} at row {row}, which is not among the {len(own)} "
            f"tokens that kept has there ({', '.join(map(str, own[:8]))}{', ...' if len(own) > 8 else ''}): the "
            "sampled token must be in its own set"
        )


def _first(rows: Tensor) -> int:
    return int(rows.flatten().nonzero()[0])


def _set_of(row: int, ids: Tensor, offsets: Tensor) -> Tensor:
    return ids[int(offsets[row]) : int(offsets[row + 1])]


_checked_kept = register_check(
    "checked_kept(Tensor token_ids, Tensor ids, Tensor offsets, Tensor vocab_size) -> Tensor", _check_kept
)


def _keep_in_place(logits: Tensor, ids: Tensor, offsets: Tensor, backend: str) -> None:
    torch.autograd.graph.increment_version(logits)  # so that a backward that saved the logits raises
    OP.kernels(backend).keep_(logits, KeptRows.of(ids, offsets))


def _keep(logits, ids, offsets, backend):
    out = logits.clone(memory_format=torch.contiguous_format)
    _keep_in_place(out, ids, offsets, backend)
    return out


kept_logits = register(
    "kept_logits(Tensor logits, Tensor ids, Tensor offsets, str backend) -> Tensor",
    _keep,
    lambda logits, *_: torch.empty_like(logits, memory_format=torch.contiguous_format),
)
kept_logits_in_place = register(
    "kept_logits_(Tensor(a!) logits, Tensor ids, Tensor offsets, str backend) -> ()", _keep_in_place, lambda *_: None
)
