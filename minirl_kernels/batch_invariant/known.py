"""What torch computes the same way in every batch, by itself, on a CPU: what an audit need not list.

Invariant means that an element of the result has the same bits whatever else is in the tensors, wherever it lies, and
on any number of threads. Found by experiment with torch 2.13 on vectors of 128, 256 and 512 bits; whatever was not
looked at is not here, so that an audit errs by listing too much.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils._pytree import tree_leaves

from ..ops.elementwise.aten import EXACT_POWERS


def _aten(names: str) -> frozenset[str]:
    return frozenset(f"aten::{name}" for name in names.split())


# other shapes and strides for the same memory
_VIEWS = _aten(
    "_reshape_alias _unsafe_view alias as_strided detach diagonal expand expand_as lift_fresh movedim narrow permute "
    "real reshape select slice split split_with_sizes squeeze swapaxes t transpose unbind unflatten unfold unsqueeze "
    "view view_as view_as_complex view_as_real"
)
# elements moved, or rounded one by one to another dtype
_COPIES = _aten(
    "_copy_from _to_copy as_strided_scatter cat clone constant_pad_nd contiguous copy diagonal_scatter embedding flip "
    "gather index index_copy index_fill index_select masked_scatter masked_select repeat repeat_interleave resize roll "
    "select_backward select_scatter slice_backward slice_scatter stack take to tril triu"
)
# constants, and what is read from a tensor
_CONSTANTS = _aten(
    "_local_scalar_dense empty empty_like empty_permuted empty_strided equal eye fill full full_like is_nonzero item "
    "new_empty new_empty_strided new_full new_ones new_zeros ones ones_like scalar_tensor tril_indices triu_indices "
    "zero zeros zeros_like"
)
# answers, not sums: nothing is rounded; a histogram counts by ones
_ANSWERS = _aten(
    "all any bitwise_and bitwise_not bitwise_or bitwise_xor bucketize eq ge gt histc isfinite isin isinf isnan le "
    "logical_and logical_not logical_or logical_xor lt ne nonzero searchsorted signbit"
)
# one element chosen of a row, by the row alone, ties too
_CHOICES = _aten("amax amin aminmax argmax argmin argsort kthvalue max maximum median min minimum sort topk fmax fmin")
# a row after its elements in their order, by one thread
_RUNNING = _aten("cummax cummin cumprod cumsum")
# rows added up in the order that they come in, each sum by one thread
_SCATTERED = _aten("embedding_dense_backward index_add scatter_add")
# a row at a time by one kernel that is the same for all rows; its backward is not here: the weights' gradients are
# partial sums of threads
_ROWS = _aten("native_layer_norm")
# the loss of each token; its mean or sum by one thread, in their order
_LOSSES = _aten("nll_loss_backward nll_loss_forward")
# One element at a time, with the same rounding in the vectors' code and in that for the rest. Not here, since there it
# differs: atan2, atanh, celu, cosh, elu, exp2, gelu, logaddexp, logit, mish, pow, rsqrt, selu, sigmoid, silu, sinh,
# softplus and their gradients (that of sigmoid is here). The gradient of tanh differs only where tanh itself was
# expanded, which autograd never does.
_POINTWISE = _aten(
    "abs acos acosh addcdiv addcmul asin asinh atan ceil clamp clamp_max clamp_min copysign cos digamma div erf erfc "
    "exp expm1 floor fmod frac hardshrink hardsigmoid hardsigmoid_backward hardswish hardswish_backward hardtanh "
    "hardtanh_backward huber_loss_backward hypot i0 kl_div leaky_relu leaky_relu_backward lerp lgamma log log10 log1p "
    "log2 log_sigmoid_backward log_sigmoid_forward logit_backward masked_fill mse_loss_backward mul nan_to_num neg "
    "nextafter polar positive reciprocal relu remainder round sigmoid_backward sign sin sinc smooth_l1_loss_backward "
    "softshrink sqrt square tan tanh tanh_backward threshold threshold_backward trunc where xlogy"
)

INVARIANT: frozenset[str] = frozenset().union(
    _VIEWS, _COPIES, _CONSTANTS, _ANSWERS, _CHOICES, _RUNNING, _SCATTERED, _ROWS, _LOSSES, _POINTWISE
)


def _of_integers(arguments: dict) -> bool:
    """Sums, products and quotients of integers are exact, unless they are to be floats."""
    values = tree_leaves(list(arguments.values()))
    dtypes = [value.dtype if isinstance(value, torch.Tensor) else value for value in values]
    return not any(
        isinstance(value, float) or (isinstance(value, torch.dtype) and value.is_floating_point) for value in dtypes
    )


def _scaled_exactly(arguments: dict) -> bool:
    """A product with another alpha is rounded before the sum, or is not, as the compiler chose for each piece."""
    return arguments.get("alpha", 1) in (1, -1) or _of_integers(arguments)


def _simple_power(arguments: dict) -> bool:
    """Products, quotients and square roots; other powers are approximated, by code that differs."""
    exponent = arguments["exponent"]
    simple = not isinstance(exponent, torch.Tensor) and exponent in EXACT_POWERS
    return simple or _of_integers(arguments)


def _put_in_order(arguments: dict) -> bool:
    """Threads add to one place in the order of their arrival, unless torch was told to be deterministic."""
    return not arguments.get("accumulate", False) or torch.are_deterministic_algorithms_enabled()


def _only_moves(arguments: dict) -> bool:
    return "reduce" not in arguments


# those that are invariant with some arguments
CONDITIONS: dict[str, Callable[[dict], bool]] = {
    "aten::_index_put_impl": _put_in_order,
    "aten::add": _scaled_exactly,
    "aten::arange": _of_integers,
    "aten::floor_divide": _of_integers,
    "aten::index_put": _put_in_order,
    "aten::pow": _simple_power,
    "aten::prod": _of_integers,
    "aten::rsub": _scaled_exactly,
    "aten::scatter": _only_moves,
    "aten::sub": _scaled_exactly,
    "aten::sum": _of_integers,
}


def is_invariant(op: torch._ops.OpOverload, args: tuple = (), kwargs: dict | None = None) -> bool:
    """Whether this call of an aten operation is invariant by itself; False of whatever is not known to be."""
    name = op._schema.name if op._schema.name.endswith("__") else op._schema.name.removesuffix("_")
    if name in INVARIANT:
        return True
    if name not in CONDITIONS:
        return False
    names = [argument.name for argument in op._schema.arguments]
    return CONDITIONS[name](dict(zip(names, args, strict=False)) | (kwargs or {}))
