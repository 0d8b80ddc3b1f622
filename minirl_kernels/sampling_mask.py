"""SamplingMask: the tokens that the sampler kept at each position, after top-k, top-p or min-p."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .common.checks import check_device, check_integers, check_tensor


@dataclass(frozen=True, eq=False)
class SamplingMask:
    """The set of kept tokens of each position, in compressed rows over the flattened positions.

    token_ids: int32 [N], the sets one after another; ids ascend within a set.
    offsets: int32 [T + 1]; the set of position t is token_ids[offsets[t]:offsets[t + 1]]. An empty set means the whole
        vocabulary: nothing was recorded, or the sampler kept every token.
    shape: shape of the positions, (T,) or (B, L) with B * L = T; None means (T,).
    Position t holds the set of the token that logits[t] scores. So the mask and the token_ids of a call have one shape.
    Indexing applies to the positions: [rows] takes rows of a mini-batch, [:, :length] shortens a micro-batch.
    Raises ValueError or TypeError that names the field. The contents are checked for tensors on the CPU only.
    """

    token_ids: Tensor
    offsets: Tensor
    shape: tuple[int, ...] | None = None

    def __post_init__(self):
        for name in ("token_ids", "offsets"):
            value = getattr(self, name)
            check_tensor(name, value)
            if value.dtype != torch.int32:
                raise TypeError(
                    f"{name} has dtype {value.dtype}: it must be int32 (SamplingMask.from_counts takes any)"
                )
            if value.dim() != 1:
                raise ValueError(f"{name} has shape {tuple(value.shape)}: it must have one dimension")
        check_device("offsets", self.offsets, self.token_ids.device)
        if not len(self.offsets):
            raise ValueError("offsets is empty: it must have one more entry than there are positions")
        positions = len(self.offsets) - 1
        shape = (positions,) if self.shape is None else tuple(self.shape)
        object.__setattr__(self, "shape", shape)
        if len(shape) not in (1, 2) or torch.Size(shape).numel() != positions:
            raise ValueError(f"shape is {shape}: it must be ({positions},), or (B, L) with B * L = {positions}")
        if self.token_ids.device.type == "cpu":
            check_sets(self.token_ids, self.offsets)

    @classmethod
    def from_counts(cls, token_ids: Tensor | np.ndarray, counts: Tensor | np.ndarray) -> SamplingMask:
        """From the sets one after another, and the number of tokens in each set; ids may have any order in a set.

        token_ids: [N]. counts: [T] or [B, L], 0 for the whole vocabulary. prime-rl calls them `ids` and `counts`.
        Raises ValueError for an id that is below 0 or twice in its set; the message names the position.
        """
        token_ids, counts = _as_tensor("token_ids", token_ids), _as_tensor("counts", counts)
        if token_ids.dim() != 1:
            raise ValueError(f"token_ids has shape {tuple(token_ids.shape)}: it must be [N]")
        if counts.dim() not in (1, 2):
            raise ValueError(f"counts has shape {tuple(counts.shape)}: it must be [T] or [B, L]")
        check_device("counts", counts, token_ids.device)
        flat = counts.flatten().long()
        if bool((flat < 0).any()) or int(flat.sum()) != len(token_ids):
            raise ValueError(
                f"counts has the smallest value {int(flat.min()) if len(flat) else 0} and the sum {int(flat.sum())}: "
                f"it must not be below 0, and sum to the {len(token_ids)} of token_ids"
            )
        if len(token_ids) >= 2**31:
            raise ValueError(f"token_ids has {len(token_ids)} entries: there must be fewer than 2**31")
        wide = token_ids.long()
        if bool((wide >= 2**31).any()):
            raise ValueError(f"token_ids has the id {int(wide.max())}: an id must be below 2**31")
        rows = torch.arange(len(flat), device=flat.device).repeat_interleave(flat)
        order = ((rows << 32) + wide).argsort()
        offsets = torch.cat([flat.new_zeros(1), flat.cumsum(0)]).int()
        return cls(wide[order].int(), offsets, tuple(counts.shape))

    @classmethod
    def from_sets(
        cls,
        sets: Sequence[Sequence[int] | None],
        *,
        num_positions: int | None = None,
        first_position: int = 0,
    ) -> SamplingMask:
        """From one list of ids per position; None or an empty list means the whole vocabulary.

        Reads SGLang's `meta_info["output_token_sampling_mask"]`, and the `sampling_mask` of vLLM's server.
        num_positions, first_position: as in from_vllm.
        """
        sets = [[] if one is None else one for one in sets]
        for position, one in enumerate(sets):
            if not isinstance(one, (Sequence, np.ndarray)):
                raise TypeError(
                    f"sampling_mask[{position}] is a {type(one).__name__}: it must be a list of token ids, or None"
                )
        num_positions = first_position + len(sets) if num_positions is None else num_positions
        if first_position < 0 or first_position + len(sets) > num_positions:
            raise ValueError(
                f"sampling_mask has {len(sets)} sets from position {first_position} on: they must fit into "
                f"{num_positions} positions"
            )
        counts = torch.zeros(num_positions, dtype=torch.int64)
        counts[first_position : first_position + len(sets)] = torch.tensor([len(one) for one in sets]).long()
        token_ids = torch.tensor([int(token) for one in sets for token in one], dtype=torch.int64)
        return cls.from_counts(token_ids, counts)

    @classmethod
    def from_vllm(
        cls, sampling_mask: Any, *, num_positions: int | None = None, first_position: int = 0
    ) -> SamplingMask:
        """From vLLM's `CompletionOutput.sampling_mask`, which has one set per generated token.

        sampling_mask: an object with token_ids: one list per token, or a flat list with offsets.
        first_position: position of the first generated token's set. logits[t] scores the token after t. So it is the
            prompt's length - 1 if positions cover the whole sequence, and 0 if they cover the response.
        num_positions: number of positions. A position without a generated token has the whole vocabulary.
        """
        if not hasattr(sampling_mask, "token_ids"):
            raise TypeError(
                f"sampling_mask is a {type(sampling_mask).__name__}: it must be CompletionOutput.sampling_mask of an "
                "engine with return_sampling_mask=True"
            )
        token_ids, offsets = sampling_mask.token_ids, getattr(sampling_mask, "offsets", None)
        if offsets is not None:
            if len(offsets) == 0 or offsets[0] != 0 or offsets[-1] != len(token_ids):
                raise ValueError(
                    f"sampling_mask.offsets is {list(offsets)}: it must go from 0 to the {len(token_ids)} of token_ids"
                )
            token_ids = [token_ids[start:end] for start, end in itertools.pairwise(offsets)]
        return cls.from_sets(token_ids, num_positions=num_positions, first_position=first_position)

    @classmethod
    def from_padded(cls, token_ids: Tensor, counts: Tensor) -> SamplingMask:
        """From padded ids [T, K] or [B, L, K]. counts: [T] or [B, L], the number of ids before the padding.

        A count of 0 means the whole vocabulary.
        """
        check_integers("token_ids", token_ids)
        check_integers("counts", counts)
        if token_ids.dim() not in (2, 3):
            raise ValueError(f"token_ids has shape {tuple(token_ids.shape)}: it must be [T, K] or [B, L, K]")
        if counts.shape != token_ids.shape[:-1]:
            raise ValueError(f"counts has shape {tuple(counts.shape)}: it must be {tuple(token_ids.shape[:-1])}")
        check_device("counts", counts, token_ids.device)
        if bool((counts > token_ids.shape[-1]).any()):
            raise ValueError(f"counts has the value {int(counts.max())}: it must be at most {token_ids.shape[-1]}, K")
        within = torch.arange(token_ids.shape[-1], device=counts.device) < counts[..., None]
        return cls.from_counts(token_ids[within], counts)

    @classmethod
    def pack(cls, sequences: Sequence[SamplingMask]) -> SamplingMask:
        """Joins sequences [T] one after another, the layout that cu_seqlens describes."""
        _check_sequences(sequences)
        return _joined(torch.cat([one.token_ids for one in sequences]), torch.cat([one.counts for one in sequences]))

    @classmethod
    def pad(cls, sequences: Sequence[SamplingMask], length: int | None = None, *, side: str = "right") -> SamplingMask:
        """Pads sequences [T] to [B, length]; padding has the whole vocabulary.

        length: by default the length of the longest sequence. side: "right" or "left", the side of the padding.
        """
        _check_sequences(sequences)
        longest = max(one.shape[0] for one in sequences)
        length = longest if length is None else length
        if longest > length:
            raise ValueError(f"length is {length}: it must be at least {longest}, the length of the longest sequence")
        if side not in ("right", "left"):
            raise ValueError(f"side is {side!r}: it must be 'right' or 'left'")
        counts = sequences[0].counts.new_zeros(len(sequences), length)
        for row, one in enumerate(sequences):
            size = one.shape[0]
            counts[row, slice(0, size) if side == "right" else slice(length - size, length)] = one.counts
        return _joined(torch.cat([one.token_ids for one in sequences]), counts)

    @property
    def counts(self) -> Tensor:
        """Number of kept tokens at each position, int32 of `shape`; 0 means the whole vocabulary."""
        return self.offsets.diff().view(self.shape)

    @property
    def device(self) -> torch.device:
        return self.token_ids.device

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> SamplingMask:
        token_ids, offsets = (tensor.to(device, non_blocking=non_blocking) for tensor in (self.token_ids, self.offsets))
        return SamplingMask(token_ids, offsets, self.shape)

    def __getitem__(self, index) -> SamplingMask:
        if isinstance(index, tuple) and len(index) > len(self.shape):
            raise IndexError(f"SamplingMask was given {len(index)} indices: it has {len(self.shape)} dimensions")
        places = torch.arange(len(self.offsets) - 1, device=self.device).view(self.shape)[index]
        if not places.dim():
            raise IndexError(f"SamplingMask was given {index!r}, which leaves no dimension: a slice keeps one")
        counts = self.counts.flatten()[places]
        starts = self.offsets[:-1].long()[places].flatten()
        sizes = counts.flatten().long()
        ends = sizes.cumsum(0)
        within = torch.arange(int(ends[-1]) if len(ends) else 0, device=self.device)
        return _joined(self.token_ids[within + (starts - ends + sizes).repeat_interleave(sizes)], counts)


def check_sets(token_ids: Tensor, offsets: Tensor) -> None:
    """Raises ValueError unless the tensors describe ascending sets. On a GPU, the host waits for the result."""
    steps = offsets.diff()
    if int(offsets[0]) != 0 or int(offsets[-1]) != len(token_ids) or bool((steps < 0).any()):
        raise ValueError(
            f"offsets goes from {int(offsets[0])} to {int(offsets[-1])}: it must go from 0 to {len(token_ids)}, the "
            "number of token_ids, and never down"
        )
    if bool((token_ids < 0).any()):
        place = int((token_ids < 0).nonzero()[0])
        raise ValueError(
            f"token_ids has the id {int(token_ids[place])} at position {_position(offsets, place)}: it must not be "
            "below 0"
        )
    disordered = token_ids[1:] <= token_ids[:-1]
    begins = offsets[1:-1].long()
    disordered[begins[(begins > 0) & (begins < len(token_ids))] - 1] = False
    if bool(disordered.any()):
        place = int(disordered.nonzero()[0])
        here, after = token_ids[place : place + 2].tolist()
        problem = f"the id {here} twice" if here == after else f"the id {after} after {here}"
        raise ValueError(
            f"token_ids has {problem} at position {_position(offsets, place)}: a set must be ascending, each id once "
            "(SamplingMask.from_counts sorts)"
        )


def _position(offsets: Tensor, place: int) -> int:
    return int((offsets[1:] <= place).sum())


def _joined(token_ids: Tensor, counts: Tensor) -> SamplingMask:
    """The mask of sets whose ids already ascend."""
    offsets = torch.cat([counts.new_zeros(1), counts.flatten().cumsum(0, dtype=torch.int32)])
    return SamplingMask(token_ids, offsets, tuple(counts.shape))


def _as_tensor(name: str, values) -> Tensor:
    # A copy, since a decoded array is read-only.
    values = torch.from_numpy(np.array(values, order="C")) if isinstance(values, np.ndarray) else values
    check_integers(name, values)
    return values


def _check_sequences(sequences: Sequence[SamplingMask]) -> None:
    if not sequences:
        raise ValueError("sequences is empty: it must hold at least one SamplingMask")
    for number, one in enumerate(sequences):
        if len(one.shape) != 1:
            raise ValueError(f"sequences[{number}] has shape {one.shape}: it must be one sequence, (T,)")
