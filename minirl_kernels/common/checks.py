"""Argument checks that the ops share. Each message gives the argument, its value and the rule for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .library import register, register_check

IGNORE_INDEX = -100
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INDEX_DTYPES = (torch.int32, torch.int64)


def check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}: it must be a tensor")


def check_integers(name: str, value: Any) -> None:
    check_tensor(name, value)
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} has dtype {value.dtype}: it must be integers")


def check_floats(name: str, value: Any) -> None:
    """value must be a tensor of float32, bfloat16 or float16, of any shape."""
    check_tensor(name, value)
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} has dtype {value.dtype}: it must be float32, bfloat16 or float16")


def check_dim(name: str, dim: Any, value: Tensor) -> None:
    """dim must be a dimension of `value`; negative dimensions count from the end."""
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"{name} is {dim!r}: it must be an integer")
    if not -value.dim() <= dim < value.dim():
        raise ValueError(f"{name} is {dim}: it must be a dimension of a tensor of shape {tuple(value.shape)}")


def check_float_matrix(name: str, value: Tensor) -> None:
    """value must be [T, D] or [B, L, D], float32, bfloat16 or float16; the last dimension contiguous and not empty."""
    check_floats(name, value)
    if value.dim() not in (2, 3):
        raise ValueError(f"{name} has shape {tuple(value.shape)}: it must be [T, D] or [B, L, D]")
    if value.shape[-1] == 0:
        raise ValueError(f"{name} has shape {tuple(value.shape)}: its last dimension must not be empty")
    if value.shape[-1] > 1 and value.stride(-1) != 1:
        raise ValueError(
            f"{name} has strides {tuple(value.stride())}: its last dimension must be contiguous (stride 1)"
        )


def check_rows_apart(name: str, value: Tensor) -> None:
    """No two rows of value may share memory, so that each can be overwritten."""
    outer = [(stride, size) for stride, size in zip(value.stride()[:-1], value.shape[:-1], strict=True) if size > 1]
    if len(outer) == 2 and outer[1][0] < outer[0][0]:
        outer = outer[::-1]
    extent = value.shape[-1]
    for stride, size in outer:
        if stride < extent:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)} and strides {tuple(value.stride())}: its rows must not overlap "
                "if they are to be overwritten"
            )
        extent += stride * (size - 1)


def check_token_ids(token_ids: Tensor, shape: torch.Size, device: torch.device) -> None:
    check_tensor("token_ids", token_ids)
    if token_ids.dtype not in INDEX_DTYPES:
        raise TypeError(f"token_ids has dtype {token_ids.dtype}: it must be int32 or int64")
    check_like("token_ids", token_ids, shape, device)


def check_like(name: str, value: Tensor, shape: torch.Size, device: torch.device) -> None:
    """value must be a tensor of this shape, on this device."""
    check_tensor(name, value)
    if value.shape != shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}: it must be {tuple(shape)}")
    check_device(name, value, device)


def check_device(name: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}: it must be on {device}")


def per_token_float(name: str, value: Any, shape: torch.Size, device: torch.device) -> Tensor | None:
    """A per-token argument as a detached float32 tensor, or None if it is None."""
    return None if value is None else _per_token_float(name, value, shape, device)


def _per_token_float(name: str, value: Any, shape: torch.Size, device: torch.device) -> Tensor:
    check_per_token_float(name, value, shape, device)
    return value.detach().float()


def check_per_token_float(name: str, value: Any, shape: torch.Size, device: torch.device) -> None:
    check_tensor(name, value)
    if not value.is_floating_point():
        raise TypeError(f"{name} has dtype {value.dtype}: it must be a floating point tensor")
    check_like(name, value, shape, device)


def always_looks(device: torch.device, backend: str) -> bool:
    """Whether a call always checks the values of its arguments. On the CPU the check does not wait for a device."""
    return device.type == "cpu" and backend != "triton"


def check_finite(name: str, values: Tensor, mask: Tensor, offsets: Tensor) -> Tensor:
    """A copy of `values`. Waits for the device.

    values, mask: one per token, [B, L] or [T].
    offsets: [B + 1], the first flat row of each response, then the number of rows.
    Raises ValueError if a value with mask 1 is NaN or infinite.
    """
    return _finite_per_token(values, mask, offsets, name)


def _check_finite(values, mask, offsets, name):
    bad = mask & ~values.isfinite()
    if bool(bad.any()):
        row = bad.flatten().nonzero()[0].item()
        raise ValueError(
            f"{name} is {values.flatten()[row].item()} at {place_of_token(row, offsets)}: "
            "it must be finite where the loss mask is 1"
        )
    return values.clone(memory_format=torch.contiguous_format)


# a registered op, because torch.compile cannot trace the branches; the used copy keeps the op from being dropped
_finite_per_token = register(
    "finite_per_token(Tensor values, Tensor mask, Tensor offsets, str name) -> Tensor",
    _check_finite,
    lambda values, *_: torch.empty_like(values, memory_format=torch.contiguous_format),
    waits=True,
)


def require(good: Tensor, rule: str, message: Callable[[], str]) -> None:
    """Raise ValueError with message() if not `good`, bool of one element. A GPU stops with `rule`: no host waits."""
    if good.is_cuda:
        torch._assert_async(good, rule)
    elif not good:
        raise ValueError(message())


def place_of_token(row: int, offsets: Tensor) -> str:
    """The words "token i of response j" for a flat row. offsets: [B + 1], the first flat row of each response."""
    response = int(torch.searchsorted(offsets[1:], torch.full_like(offsets[0], row), right=True))
    return f"token {row - offsets[response].item()} of response {response}"


def per_token_temperature(temperature: Any, shape: torch.Size, device: torch.device) -> Tensor:
    """The temperature, a number or a tensor, as a float32 tensor of `shape`."""
    if isinstance(temperature, Tensor):
        return _per_token_float("temperature", temperature, shape, device)
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(f"temperature is {temperature!r}: it must be a number or a tensor of one value per token")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}: it must be above 0 and finite")
    if torch.compiler.is_compiling():  # torch.compile recompiles for each new value of torch.full
        return torch.ones((), dtype=torch.float32, device=device).mul(temperature).expand(shape)
    return torch.full(shape, temperature, dtype=torch.float32, device=device)


def check_contents(token_ids: Tensor, vocab_size: int | Tensor, temperature: Tensor) -> Tensor:
    """Check that the ids of all tokens that are not ignored are in range, and their temperatures above 0 and finite.

    Returns a copy of token_ids. Waits for the device.
    Raises ValueError.
    """
    if not isinstance(vocab_size, Tensor):
        vocab_size = torch.full((), vocab_size, dtype=torch.int64)
    return _checked_token_ids(token_ids, vocab_size, temperature)


def _check_contents(token_ids, vocab_size, temperature):
    vocab_size = vocab_size.item()
    kept = token_ids != IGNORE_INDEX
    bad = kept & ((token_ids < 0) | (token_ids >= vocab_size))
    if bool(bad.any()):
        raise ValueError(token_id_message(bad.flatten().nonzero()[0].item(), token_ids, vocab_size))
    bad = kept & ~((temperature > 0) & temperature.isfinite())
    if bool(bad.any()):
        raise ValueError(f"temperature has the value {temperature[bad][0].item()}: it must be above 0 and finite")


_checked_token_ids = register_check(
    "checked_token_ids(Tensor token_ids, Tensor vocab_size, Tensor temperature) -> Tensor", _check_contents
)


def token_id_message(row: int, token_ids: Tensor, vocab_size: int) -> str:
    return (
        f"token_ids has the id {token_ids.flatten()[row].item()} at row {row}: "
        f"an id must be in [0, {vocab_size}), or {IGNORE_INDEX} to be ignored"
    )
