"""The mapping of tokens to responses: padded [B, L], or packed [T] with cu_seqlens."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from ...common.checks import check_device, check_tensor, require
from ...common.library import register


class Padded:
    """Rows are responses: tokens [B, L]."""

    cu_seqlens = None  # the offsets that a kernel needs: it computes them from the shape

    def __init__(self, shape: torch.Size, device: torch.device):
        self.shape = shape
        self.num_responses = shape[0]
        self._device = device
        self._offsets: Tensor | None = None

    @property
    def offsets(self) -> Tensor:
        """[B + 1], made on first use: the kernels do without."""
        if self._offsets is None:
            self._offsets = torch.arange(self.shape[0] + 1, device=self._device) * self.shape[1]
        return self._offsets

    def response_sum(self, values: Tensor) -> Tensor:
        """[..., B, L] -> [..., B]."""
        if not values.is_cpu:  # on a GPU a segment sum has one thread per segment, and sum(-1) has many
            return values.sum(-1)
        return _segment_sum(values.flatten(-2), self.offsets)

    def to_tokens(self, per_response: Tensor) -> Tensor:
        """[B] -> [B, L]."""
        return per_response[:, None].expand(self.shape)

    def parts(self, bounds: list[int]) -> Iterator[tuple[slice, Padded]]:
        """(index of its tokens in a per-token tensor, its layout) of each part: responses bounds[i]:bounds[i + 1]."""
        for start, stop in itertools.pairwise(bounds):
            yield slice(start, stop), Padded(torch.Size((stop - start, self.shape[1])), self._device)

    def to(self, device: torch.device) -> Padded:
        return Padded(self.shape, device)


class Packed:
    """Responses one after another: tokens [T]. Response i is cu_seqlens[i]:cu_seqlens[i + 1]."""

    def __init__(self, shape: torch.Size, offsets: Tensor):
        self.shape = shape
        self.num_responses = offsets.shape[0] - 1
        self.offsets = self.cu_seqlens = offsets
        self._response_of_token: Tensor | None = None

    @property
    def response_of_token(self) -> Tensor:
        """[T], made on first use: the kernels do without."""
        if self._response_of_token is None:
            tokens = torch.arange(self.shape[0], device=self.offsets.device)
            self._response_of_token = torch.searchsorted(self.offsets[1:], tokens, right=True)
        return self._response_of_token

    def response_sum(self, values: Tensor) -> Tensor:
        """[..., T] -> [..., B]."""
        return _segment_sum(values, self.offsets)

    def to_tokens(self, per_response: Tensor) -> Tensor:
        """[B] -> [T]."""
        return per_response[self.response_of_token]

    def parts(self, bounds: list[int]) -> Iterator[tuple[slice, Packed]]:
        """The same as Padded.parts. Waits for the device."""
        ends = self.offsets.tolist()
        for start, stop in itertools.pairwise(bounds):
            first, last = ends[start], ends[stop]
            offsets = self.offsets[start : stop + 1] - first
            yield slice(first, last), Packed(torch.Size((last - first,)), offsets)

    def to(self, device: torch.device) -> Packed:
        return Packed(self.shape, self.offsets.to(device))


def ordered_sum(values: Tensor) -> Tensor:
    """[..., N] -> [...]. On the CPU the order is fixed, because torch splits a long sum over its threads."""
    if not values.is_cpu:
        return values.sum(-1)
    return _segment_sum(values, torch.arange(2) * values.shape[-1]).squeeze(-1)


def _segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """[..., T] -> [..., B] in the order of the tokens, so that threads, padding and other responses change no bits.

    segment_reduce has one writer per response; index_add has atomics.
    """
    offsets = offsets.expand(*values.shape[:-1], -1)
    axis = values.dim() - 1
    return torch.segment_reduce(values.contiguous(), "sum", offsets=offsets, axis=axis, unsafe=True, initial=0)


def make_layout(shape: torch.Size, cu_seqlens: Tensor | None, device: torch.device) -> Padded | Packed:
    """The layout of per-token arguments of `shape`. Raises ValueError if shape and cu_seqlens do not fit together."""
    check_layout(shape, cu_seqlens, device)
    return Padded(shape, device) if cu_seqlens is None else Packed(shape, _checked_offsets(cu_seqlens, shape[0]))


def check_layout(shape: torch.Size, cu_seqlens: Tensor | None, device: torch.device) -> None:
    """Raise ValueError if shape and cu_seqlens do not fit together. The values of cu_seqlens are not read."""
    if cu_seqlens is None:
        if len(shape) != 2:
            raise ValueError(
                f"cu_seqlens is None with tokens of shape {tuple(shape)}: it must be int32 [B + 1] where tokens are "
                "packed, [T]; padded tokens are [B, L]"
            )
        return
    if len(shape) != 1:
        raise ValueError(f"cu_seqlens is given with tokens of shape {tuple(shape)}: packed tokens must be [T]")
    check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens has shape {tuple(cu_seqlens.shape)} and dtype {cu_seqlens.dtype}: it must be int32 [B + 1]"
        )
    if cu_seqlens.shape[0] == 1 and shape[0] > 0:
        raise ValueError(
            f"cu_seqlens has shape (1,) with {shape[0]} tokens: it must be int32 [B + 1] for B responses, at least one"
        )
    check_device("cu_seqlens", cu_seqlens, device)


def require_offsets(good: Tensor, cu_seqlens: Tensor, num_tokens: int) -> None:
    """Raise ValueError if not `good`, bool of one element. A GPU stops before a read out of bounds."""
    require(
        good,
        f"cu_seqlens must start at 0, never fall, and end at {num_tokens}",
        lambda: (
            f"cu_seqlens is {cu_seqlens.tolist()[:8]}…: it must start at 0, never fall, and end at the number of "
            f"tokens, {num_tokens}"
        ),
    )


def _check_offsets(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    good = (cu_seqlens.diff() >= 0).all() & (cu_seqlens[0] == 0) & (cu_seqlens[-1] == num_tokens)
    require_offsets(good, cu_seqlens, num_tokens)
    return cu_seqlens.to(torch.int64, copy=True)


# an op, because torch.compile cannot trace branches on values
_checked_offsets = register(
    "checked_offsets(Tensor cu_seqlens, SymInt num_tokens) -> Tensor",
    _check_offsets,
    lambda cu_seqlens, _: torch.empty_like(cu_seqlens, dtype=torch.int64),
)
