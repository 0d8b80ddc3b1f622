"""The two forms of a loss call: with the arguments of a loss, or with a PolicyLossInputs made of them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, TypeVar, overload

from .inputs import PolicyLossInputs

Arguments = ParamSpec("Arguments")
Output = TypeVar("Output", covariant=True)

_PARAMETERS = {
    name: parameter.default is inspect.Parameter.empty
    for name, parameter in inspect.signature(PolicyLossInputs.prepare).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name != "check"
}
_REQUIRED = tuple(name for name, is_required in _PARAMETERS.items() if is_required)


class LossCall(Protocol[Arguments, Output]):
    """The type of a loss function that accepts both forms."""

    @overload
    def __call__(self, *args: Arguments.args, **options: Arguments.kwargs) -> Output: ...

    @overload
    def __call__(self, *args: Any, inputs: PolicyLossInputs, **options: Any) -> Output: ...


def takes_inputs(call: Callable[Arguments, Output]) -> LossCall[Arguments, Output]:
    """`call` in both forms: if `inputs` is given, the arguments that it was made of must be left out."""

    @functools.wraps(call)
    def in_either_form(*arguments, **options):
        inputs = options.get("inputs")
        if inputs is None:
            return call(*arguments, **options)
        if not isinstance(inputs, PolicyLossInputs):
            raise TypeError(f"inputs is a {type(inputs).__name__}: it must be a PolicyLossInputs")
        for name in _PARAMETERS:
            if name in options:
                raise TypeError(f"{name} is given with inputs: it must be left out, because inputs was made of it")
        return call(*arguments, **dict.fromkeys(_REQUIRED), **options)

    return in_either_form
