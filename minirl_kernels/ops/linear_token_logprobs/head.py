"""A linear head: its checked arguments as one value, and its rows in the form that the ops take."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...common.checks import (
    always_looks,
    check_contents,
    check_device,
    check_float_matrix,
    check_tensor,
    check_token_ids,
    per_token_temperature,
)
from ...common.records import with_values
from ...sampling_mask import SamplingMask
from ..kept_logits.op import KeptRows, check_kept
from ..token_logprobs.rows import Epilogue
from .reference import linear_logits
from .sharded import Shard


class HeadRows(NamedTuple):
    """A head with flat rows of hidden states, and the token, temperature and kept set of each row."""

    hidden: Tensor  # [T, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    token_ids: Tensor  # [T]
    temperature: Tensor  # [T] float32
    softcap: float  # 0: none
    kept_ids: Tensor | None
    kept_offsets: Tensor | None

    @property
    def epilogue(self) -> Epilogue:
        return Epilogue(self.bias, self.softcap)

    @property
    def kept(self) -> KeptRows | None:
        return KeptRows.of(self.kept_ids, self.kept_offsets)

    def detached(self) -> HeadRows:
        """The same rows for the kernels: detached, with the bias in float32."""
        bias = None if self.bias is None else self.bias.detach().float()
        return with_values(self, hidden=self.hidden.detach(), weight=self.weight.detach(), bias=bias)

    def at(self, index: Tensor | slice) -> HeadRows:
        """Some of the rows. The kept sets stay the sets of all rows."""
        values = {name: getattr(self, name)[index] for name in ("hidden", "token_ids", "temperature")}
        return with_values(self, **values)


class Needs(NamedTuple):
    """The gradients of a linear head that the backward must compute."""

    needs_hidden: bool
    needs_weight: bool
    needs_bias: bool


class Head(NamedTuple):
    """The arguments that the linear losses have in place of logits: checked and cast.

    logit_scale is folded into temperature and softcap.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    temperature: Tensor
    softcap: float  # 0: none
    shard: Shard | None
    kept: SamplingMask | None

    def rows(self, token_ids: Tensor) -> HeadRows:
        """Flat rows, one per token."""
        sets = (None, None) if self.kept is None else (self.kept.token_ids, self.kept.offsets)
        return HeadRows(
            self.hidden.flatten(0, -2),
            self.weight,
            self.bias,
            token_ids.flatten().contiguous(),
            self.temperature.flatten().contiguous(),
            self.softcap,
            *sets,
        )

    def logits(self) -> Tensor:
        return linear_logits(self.hidden, self.weight, self.bias, self.softcap)

    def check_contents(self, token_ids: Tensor, check: bool, backend: str) -> Tensor:
        """token_ids after the checks of their values, the temperature and kept. A GPU checks only if `check`."""
        if self.shard and backend == "reference":
            raise ValueError(
                "process_group is given with backend='reference': it must be None, or the backend 'cpu' or 'triton'"
            )
        # no property of this NamedTuple: torch 2.10 cannot trace it
        vocab_size = self.shard.vocab_size if self.shard else self.weight.shape[0]
        if check or always_looks(self.hidden.device, backend):
            token_ids = check_contents(token_ids, vocab_size, self.temperature)
        return check_kept(self.kept, token_ids, vocab_size, check, backend)[0]


def prepare_head(hidden, weight, token_ids, bias, temperature, logit_softcap, logit_scale, process_group, kept) -> Head:
    """Check the arguments that the linear losses share."""
    check_tensor("hidden", hidden)
    check_tensor("weight", weight)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    check_float_matrix("hidden", hidden)
    check_float_matrix("weight", weight)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: it must be [V, {hidden.shape[-1]}], H of hidden")
    if weight.shape[0] == 0 and process_group is None:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: its vocabulary must not be empty")
    if weight.dtype != hidden.dtype:
        raise TypeError(f"weight has dtype {weight.dtype}: it must be the dtype of hidden, {hidden.dtype}")
    check_device("weight", weight, hidden.device)
    if bias is not None:
        check_tensor("bias", bias)
        if not bias.is_floating_point():
            raise TypeError(f"bias has dtype {bias.dtype}: it must be a floating point tensor")
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias has shape {tuple(bias.shape)}: it must be [{weight.shape[0]}], V of weight")
        check_device("bias", bias, hidden.device)
    check_token_ids(token_ids, hidden.shape[:-1], hidden.device)
    temperature = per_token_temperature(temperature, token_ids.shape, hidden.device)
    _check_positive("logit_scale", logit_scale)
    if logit_softcap is not None:
        _check_positive("logit_softcap", logit_softcap)
    return Head(
        hidden,
        weight,
        bias,
        temperature if logit_scale == 1 else temperature / logit_scale,
        0.0 if logit_softcap is None else logit_softcap / logit_scale,
        None if process_group is None else Shard(process_group, weight.shape[0], hidden.device),
        kept,
    )


def _check_positive(name, value):
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}: it must be a number")
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} is {value}: it must be above 0 and finite")
