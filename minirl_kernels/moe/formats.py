"""Decoders for the formats in which other projects send routed experts. Each returns integers [rows, layers, K]."""

from __future__ import annotations

import base64
import io

import numpy as np

_NEMO_RL_MAGIC = "nrlre1"


def decode_npy(payload: str | bytes) -> np.ndarray:
    """The array in a base64 string of an .npy file, as vLLM's server sends it. Raises ValueError."""
    try:
        return np.load(io.BytesIO(_base64(payload)), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(
            f"routed_experts does not decode: it must be a base64 string of an .npy file ({error})"
        ) from None


def decode_raw(payload: str | bytes, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """The C-contiguous array in `payload`: a base64 string, or plain bytes. One size may be -1. Raises ValueError."""
    data = _base64(payload) if isinstance(payload, str) else bytes(payload)
    kind = _integer_dtype(dtype)
    row = int(np.prod([size for size in shape if size != -1])) * kind.itemsize
    if (len(data) % row if -1 in shape else len(data) != row) != 0:
        raise ValueError(f"routed_experts has {len(data)} bytes: they must make {kind} of shape {list(shape)}")
    return np.frombuffer(data, kind).reshape(shape)


def decode_nemo_rl(payload: str) -> np.ndarray:
    """The array in NeMo-RL's string "nrlre1:<dtype>:<S>x<L>x<K>:<base64>". Raises ValueError."""
    parts = payload.split(":")
    if len(parts) != 4 or parts[0] != _NEMO_RL_MAGIC:
        raise ValueError(
            f"routed_experts begins with {payload[:20]!r}: it must be '{_NEMO_RL_MAGIC}:<dtype>:<S>x<L>x<K>:<base64>'"
        )
    sizes = parts[2].split("x")
    if len(sizes) != 3 or not all(size.isdecimal() for size in sizes):
        raise ValueError(f"routed_experts has the shape {parts[2]!r}: it must be '<S>x<L>x<K>'")
    return decode_raw(parts[3], parts[1], tuple(map(int, sizes)))


def _base64(payload: str | bytes) -> bytes:
    try:
        return base64.b64decode(payload, validate=True)
    except ValueError as error:
        raise ValueError(f"routed_experts does not decode: it must be base64 ({error})") from None


def _integer_dtype(dtype: str) -> np.dtype:
    try:
        kind = np.dtype(dtype)
    except TypeError:
        kind = None
    if kind is None or kind.kind not in "iu":
        raise ValueError(f"dtype is {dtype!r}: it must name integers, such as 'uint8'")
    return kind
