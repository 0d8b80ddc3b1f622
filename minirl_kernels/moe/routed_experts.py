"""RoutedExperts: the expert ids of each token and MoE layer, with a mask of the recorded ones."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..common.checks import check_integers, check_tensor
from . import formats


@dataclass(frozen=True, eq=False)
class RoutedExperts:
    """Expert ids per token and MoE layer, for replay.

    experts: [T, layers, K] or [B, L, layers, K]; uint8 if num_experts <= 256, otherwise uint16. The layers are the
        model's MoE layers in order, without its dense layers. The ids are the routers' own (logical) expert ids.
    valid: bool, the shape of experts without K. False means padding, or that nothing was recorded. Such a token routes
        naturally in that layer, and its entries in experts are ignored.
    num_experts: E, the number of experts in a layer.
    Indexing applies to the token dimensions: [rows] takes rows of a mini-batch, [:, :length] shortens a micro-batch.
    Raises TypeError or ValueError that names the field.
    """

    experts: Tensor
    valid: Tensor
    num_experts: int

    def __post_init__(self):
        check_tensor("experts", self.experts)
        check_tensor("valid", self.valid)
        dtype = compact_dtype(self.num_experts)
        if self.experts.dtype != dtype:
            raise TypeError(
                f"experts has dtype {self.experts.dtype}: it must be {dtype} for {self.num_experts} experts "
                "(RoutedExperts.from_ids takes any integers)"
            )
        if self.experts.dim() not in (3, 4):
            raise ValueError(
                f"experts has shape {tuple(self.experts.shape)}: it must be [T, layers, K] or [B, L, layers, K]"
            )
        if self.valid.dtype != torch.bool:
            raise TypeError(f"valid has dtype {self.valid.dtype}: it must be bool")
        if self.valid.shape != self.experts.shape[:-1]:
            raise ValueError(f"valid has shape {tuple(self.valid.shape)}: it must be {tuple(self.experts.shape[:-1])}")
        if self.valid.device != self.experts.device:
            raise ValueError(f"valid is on {self.valid.device}: it must be on {self.experts.device}")

    @classmethod
    def from_ids(
        cls,
        ids: Tensor | np.ndarray,
        *,
        num_experts: int,
        valid: Tensor | None = None,
        num_tokens: int | None = None,
        first_token: int = 0,
        layers: Sequence[int] | None = None,
    ) -> RoutedExperts:
        """From integers of any width, [rows, layers, K]. K ids of -1 mean that nothing was recorded there.

        valid: [rows] or [rows, layers] bool.
        num_tokens: number of tokens in the sequence, if it has more tokens than there are rows. Row i belongs to token
            first_token + i. The other tokens are missing; engines return no row for the last sampled token.
        layers: indices of the model's MoE layers within ids (see moe_layer_indices), if ids has every decoder layer.
        Raises ValueError for more rows than tokens, and for an id that is out of range or twice in its row. The message
        names the token and the layer.
        """
        dtype = compact_dtype(num_experts)
        ids = _as_tensor(ids)
        check_integers("routed_experts", ids)
        if ids.dim() != 3:
            raise ValueError(f"routed_experts has shape {tuple(ids.shape)}: it must be [rows, layers, K]")
        valid = _rows_valid(valid, ids)
        if layers is not None:
            layers = list(layers)
            absent = [layer for layer in layers if not 0 <= layer < ids.shape[1]]
            if absent:
                raise ValueError(f"layers has {absent[0]}: routed_experts has the layers 0 to {ids.shape[1] - 1}")
            ids, valid = ids[:, layers], valid[:, layers]
        rows = ids.shape[0]
        num_tokens = first_token + rows if num_tokens is None else num_tokens
        if first_token < 0 or first_token + rows > num_tokens:
            raise ValueError(
                f"routed_experts has {rows} rows from token {first_token} on: they must fit into {num_tokens} tokens"
            )
        wide = ids.long()
        valid = valid & ~(wide == -1).all(-1)
        _check_ids(wide, valid, num_experts, first_token)
        experts = torch.zeros((num_tokens, *ids.shape[1:]), dtype=dtype, device=ids.device)
        known = torch.zeros(experts.shape[:2], dtype=torch.bool, device=ids.device)
        span = slice(first_token, first_token + rows)
        experts[span] = wide.masked_fill(~valid[..., None], 0).to(dtype)
        known[span] = valid
        return cls(experts, known, num_experts)

    @classmethod
    def from_vllm(
        cls,
        routed_experts: np.ndarray | str | bytes,
        *,
        num_experts: int,
        num_tokens: int,
        first_token: int = 0,
        layers: Sequence[int] | None = None,
    ) -> RoutedExperts:
        """From vLLM: `CompletionOutput.routed_experts` [tokens - 1, decoder layers, K], or its server's base64 string.

        num_tokens: tokens of prompt and response. first_token: SamplingParams.routed_experts_prompt_start.
        layers: as in from_ids; vLLM sends every decoder layer.
        """
        ids = formats.decode_npy(routed_experts) if isinstance(routed_experts, (str, bytes)) else routed_experts
        return cls.from_ids(ids, num_experts=num_experts, num_tokens=num_tokens, first_token=first_token, layers=layers)

    @classmethod
    def from_sglang(
        cls,
        routed_experts: str | bytes | np.ndarray,
        *,
        num_experts: int,
        num_layers: int,
        top_k: int,
        num_tokens: int,
        first_token: int = 0,
        layers: Sequence[int] | None = None,
        dtype: str = "int32",
    ) -> RoutedExperts:
        """From SGLang: `meta_info["routed_experts"]`, base64 of int32 [tokens - 1, num_layers, top_k].

        Slime's decoded array of this shape is accepted too.
        first_token: the request's routed_experts_start_len. dtype: `meta_info["routed_experts_dtype"]`, if present.
        num_layers: number of recorded layers. layers: the model's MoE layers among them, as in from_ids.
        """
        if isinstance(routed_experts, (str, bytes)):
            payload = routed_experts.decode() if isinstance(routed_experts, bytes) else routed_experts
            routed_experts = formats.decode_raw(payload, dtype, (-1, num_layers, top_k))
        elif routed_experts.shape[1:] != (num_layers, top_k):
            raise ValueError(
                f"routed_experts has shape {tuple(routed_experts.shape)}: it must be [rows, {num_layers}, {top_k}]"
            )
        return cls.from_ids(
            routed_experts, num_experts=num_experts, num_tokens=num_tokens, first_token=first_token, layers=layers
        )

    @classmethod
    def from_nemo_rl(
        cls,
        routed_experts: str | Tensor,
        *,
        num_experts: int,
        num_tokens: int | None = None,
        layers: Sequence[int] | None = None,
    ) -> RoutedExperts:
        """From NeMo-RL: int8, int16 or int32 [tokens, layers, K], or its "nrlre1:…" string. -1 means not recorded."""
        ids = formats.decode_nemo_rl(routed_experts) if isinstance(routed_experts, str) else routed_experts
        return cls.from_ids(ids, num_experts=num_experts, num_tokens=num_tokens, layers=layers)

    @classmethod
    def from_prime_rl(
        cls,
        data: str | bytes,
        shape: Sequence[int],
        dtype: str = "uint8",
        *,
        num_experts: int,
        num_recorded: int,
        layers: Sequence[int] | None = None,
    ) -> RoutedExperts:
        """From prime-rl: data (bytes or their base64 string), shape [tokens, layers, K] and dtype.

        num_recorded: number of recorded tokens. prime-rl pads the rest with zeros; these tokens count as missing.
        """
        ids = formats.decode_raw(data, dtype, tuple(shape))
        if not 0 <= num_recorded <= len(ids):
            raise ValueError(f"num_recorded is {num_recorded}: it must be at most the {len(ids)} tokens of the data")
        return cls.from_ids(ids[:num_recorded], num_experts=num_experts, num_tokens=len(ids), layers=layers)

    @classmethod
    def pack(cls, sequences: Sequence[RoutedExperts]) -> RoutedExperts:
        """Joins sequences [T, layers, K] one after another, the layout that cu_seqlens describes."""
        _check_same_sizes(sequences)
        return cls(
            torch.cat([one.experts for one in sequences]),
            torch.cat([one.valid for one in sequences]),
            sequences[0].num_experts,
        )

    @classmethod
    def pad(
        cls, sequences: Sequence[RoutedExperts], length: int | None = None, *, side: str = "right"
    ) -> RoutedExperts:
        """Pads sequences [T, layers, K] to [B, length, layers, K]; padding is not valid.

        length: by default the length of the longest sequence. side: "right" or "left", the side of the padding.
        """
        _check_same_sizes(sequences)
        longest = max(len(one.experts) for one in sequences)
        length = longest if length is None else length
        if longest > length:
            raise ValueError(f"length is {length}: it must be at least {longest}, the length of the longest sequence")
        if side not in ("right", "left"):
            raise ValueError(f"side is {side!r}: it must be 'right' or 'left'")
        first = sequences[0]
        experts = first.experts.new_zeros((len(sequences), length, *first.experts.shape[1:]))
        valid = first.valid.new_zeros(experts.shape[:-1])
        for row, one in enumerate(sequences):
            size = len(one.experts)
            span = slice(0, size) if side == "right" else slice(length - size, length)
            experts[row, span], valid[row, span] = one.experts, one.valid
        return cls(experts, valid, first.num_experts)

    @property
    def num_layers(self) -> int:
        return self.experts.shape[-2]

    @property
    def top_k(self) -> int:
        return self.experts.shape[-1]

    @property
    def num_tokens(self) -> int:
        return self.experts.shape[:-2].numel()

    def num_missing(self, token_mask: Tensor | None = None) -> int:
        """Number of tokens without recorded experts in some layer. token_mask: [T] or [B, L] bool, tokens to count."""
        missing = ~self.valid.all(-1)
        if token_mask is not None:
            if token_mask.shape != missing.shape:
                raise ValueError(f"token_mask has shape {tuple(token_mask.shape)}: it must be {tuple(missing.shape)}")
            missing = missing & token_mask
        return int(missing.sum())

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """(routed_experts [T, K], valid [T]) of one layer, over the flattened tokens, for moe_routing."""
        return self.experts[..., index, :].flatten(0, -2), self.valid[..., index].flatten()

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> RoutedExperts:
        experts, valid = (tensor.to(device, non_blocking=non_blocking) for tensor in (self.experts, self.valid))
        return RoutedExperts(experts, valid, self.num_experts)

    def __getitem__(self, index) -> RoutedExperts:
        dims = self.experts.dim() - 2
        if isinstance(index, tuple) and len(index) > dims:
            raise IndexError(f"RoutedExperts was given {len(index)} indices: it has {dims} dimensions of tokens")
        return RoutedExperts(self.experts[index], self.valid[index], self.num_experts)


def compact_dtype(num_experts: int) -> torch.dtype:
    if isinstance(num_experts, bool) or not isinstance(num_experts, int):
        raise TypeError(f"num_experts is {num_experts!r}: it must be an integer")
    if not 1 <= num_experts <= 65_536:
        raise ValueError(f"num_experts is {num_experts}: it must be from 1 to 65536")
    return torch.uint8 if num_experts <= 256 else torch.uint16


def _as_tensor(ids) -> Tensor:
    # A copy, since a decoded array is read-only.
    return torch.from_numpy(np.array(ids, order="C")) if isinstance(ids, np.ndarray) else ids


def _rows_valid(valid, ids) -> Tensor:
    if valid is None:
        return torch.ones(ids.shape[:2], dtype=torch.bool, device=ids.device)
    check_tensor("valid", valid)
    if valid.dtype != torch.bool:
        raise TypeError(f"valid has dtype {valid.dtype}: it must be bool")
    if valid.shape not in (ids.shape[:1], ids.shape[:2]):
        raise ValueError(
            f"valid has shape {tuple(valid.shape)}: it must be {tuple(ids.shape[:1])} or {tuple(ids.shape[:2])}"
        )
    return valid[:, None].expand(ids.shape[:2]) if valid.dim() == 1 else valid


def _check_ids(ids, valid, num_experts, first_token) -> None:
    outside = ((ids < 0) | (ids >= num_experts)).any(-1) & valid
    if bool(outside.any()):
        token, layer = outside.nonzero()[0].tolist()
        wrong = next(expert for expert in ids[token, layer].tolist() if not 0 <= expert < num_experts)
        raise ValueError(
            f"routed_experts has the expert {wrong} at token {first_token + token}, layer {layer}: an expert must be "
            f"in [0, {num_experts}), and a row that was not recorded must hold -1 only"
        )
    twice = torch.zeros_like(valid)
    for i, j in itertools.combinations(range(ids.shape[-1]), 2):  # faster than a sort, as K is small
        twice |= ids[..., i] == ids[..., j]
    twice &= valid
    if bool(twice.any()):
        token, layer = twice.nonzero()[0].tolist()
        raise ValueError(
            f"routed_experts has an expert twice at token {first_token + token}, layer {layer}: "
            f"{ids[token, layer].tolist()} must differ (zero padding is not a route: mark it as not valid)"
        )


def _check_same_sizes(sequences) -> None:
    if not sequences:
        raise ValueError("sequences is empty: it must hold at least one RoutedExperts")
    for number, one in enumerate(sequences):
        if one.experts.dim() != 3:
            raise ValueError(f"sequences[{number}] has shape {tuple(one.experts.shape)}: it must be [T, layers, K]")
        found = (one.num_layers, one.top_k, one.num_experts)
        expected = (sequences[0].num_layers, sequences[0].top_k, sequences[0].num_experts)
        if found != expected:
            raise ValueError(
                f"sequences[{number}] has (layers, K, experts) {found}: they must be {expected}, as in sequences[0]"
            )
