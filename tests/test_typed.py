"""A type checker learns from the package how the type of a result depends on the arguments."""

import inspect
from typing import Any, assert_type

import pytest
import torch
from torch import Tensor

import minirl_kernels
from minirl_kernels import linear_token_logprobs, token_logprobs


def test_the_entropy_comes_with_its_flag() -> None:
    """The type checker of .ci/run also reads this file, and fails if an assert_type does not hold."""
    logits, ids = torch.zeros(2, 3), torch.tensor([0, 1])
    flags = [False, True]
    alone = assert_type(token_logprobs(logits, ids, backend="reference"), Tensor)
    pair = assert_type(token_logprobs(logits, ids, with_entropy=True, backend="reference"), tuple[Tensor, Tensor])
    either = assert_type(
        token_logprobs(logits, ids, with_entropy=flags[1], backend="reference"), Tensor | tuple[Tensor, Tensor]
    )
    assert alone.shape == pair[0].shape == pair[1].shape == ids.shape
    assert isinstance(either, tuple)
    hidden, weight = torch.zeros(2, 4), torch.zeros(3, 4)
    of_head = assert_type(linear_token_logprobs(hidden, weight, ids, backend="reference"), Tensor)
    pair = assert_type(
        linear_token_logprobs(hidden, weight, ids, with_entropy=True, backend="reference"), tuple[Tensor, Tensor]
    )
    assert of_head.shape == pair[1].shape == ids.shape


def functions_of(value: Any) -> list[Any]:
    """A function itself, or the public methods and class methods of a class."""
    if inspect.isfunction(value):
        return [value]
    members = (getattr(value, name) for name in vars(value) if not name.startswith("_"))
    return [member for member in members if inspect.isfunction(member) or inspect.ismethod(member)]


@pytest.mark.parametrize("name", minirl_kernels.__all__)
def test_public_calls_say_their_types(name: str) -> None:
    for function in functions_of(getattr(minirl_kernels, name)):
        signature = inspect.signature(function)
        untyped = [
            parameter.name
            for parameter in signature.parameters.values()
            # overrides are fields of a configuration, which declares their types
            if parameter.annotation is parameter.empty and parameter.name not in ("self", "overrides")
        ]
        assert not untyped, function.__qualname__
        assert signature.return_annotation is not signature.empty, function.__qualname__
