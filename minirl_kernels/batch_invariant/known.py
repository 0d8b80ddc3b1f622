"""The aten operations whose kernels in torch are batch-invariant. An audit does not list them.

Invariant means that an element of the result has the same bits in every batch, at every position, and with any number
of threads. The lists for the CPU come from experiments with torch 2.13 and vectors of 128, 256 and 512 bits. A GPU has
a list of its own: it has more elementwise operations, and no sums. An operation that was not examined is absent, so an
audit may list too many operations but not too few.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils._pytree import tree_leaves

from ..ops.elementwise.aten import EXACT_POWERS


def _aten(names: str) -> frozenset[str]:
    return frozenset(f"aten::{name}" for name in names.split())


# Views: other shapes and strides for the same memory.
_VIEWS = _aten(
    "_reshape_alias _unsafe_view alias as_strided detach diagonal expand expand_as lift_fresh movedim narrow permute "
    "real reshape select slice split split_with_sizes squeeze swapaxes t transpose unbind unflatten unfold unsqueeze "
    "view view_as view_as_complex view_as_real"
)
# Copies: elements are moved, or rounded one by one to another dtype.
_COPIES = _aten(
    "_copy_from _to_copy as_strided_scatter cat clone constant_pad_nd contiguous copy diagonal_scatter embedding flip "
    "gather index index_copy index_fill index_select masked_scatter masked_select repeat repeat_interleave resize roll "
    "select_backward select_scatter slice_backward slice_scatter stack take to tril triu"
)
# Constants, and reads of tensor values.
_CONSTANTS = _aten(
    "_local_scalar_dense empty empty_like empty_permuted empty_strided equal eye fill full full_like is_nonzero item "
    "new_empty new_empty_strided new_full new_ones new_zeros ones ones_like scalar_tensor tril_indices triu_indices "
    "zero zeros zeros_like"
)
# Comparisons, searches and counts: nothing is rounded.
_ANSWERS = _aten(
    "all any bitwise_and bitwise_not bitwise_or bitwise_xor bucketize eq ge gt histc isfinite isin isinf isnan le "
    "logical_and logical_not logical_or logical_xor lt ne nonzero searchsorted signbit"
)
# Selections: the chosen element depends on its row alone, also for ties.
_CHOICES = _aten("amax amin aminmax argmax argmin argsort kthvalue max maximum median min minimum sort topk fmax fmin")
# Scans: one thread goes through a row in order.
_RUNNING = _aten("cummax cummin cumprod cumsum")
# Scattered sums: one thread adds the rows of a sum in order.
_SCATTERED = _aten("embedding_dense_backward index_add scatter_add")
# Row kernels: the same code for every row. The backward is absent, since its weight gradients are partial sums of
# threads.
_ROWS = _aten("native_layer_norm")
# Losses: one value per token; one thread computes their sum or mean, in order.
_LOSSES = _aten("nll_loss_backward nll_loss_forward")
# Elementwise operations whose vector code and scalar code round the same way. Absent, since the two differ: atan2,
# atanh, celu, cosh, elu, exp2, gelu, logaddexp, logit, mish, pow, rsqrt, selu, sigmoid, silu, sinh, softplus and their
# gradients, except sigmoid's gradient. tanh_backward differs only for an expanded tensor, which autograd never passes.
_POINTWISE = _aten(
    "abs acos acosh addcdiv addcmul asin asinh atan ceil clamp clamp_max clamp_min copysign cos digamma div erf erfc "
    "exp expm1 floor fmod frac hardshrink hardsigmoid hardsigmoid_backward hardswish hardswish_backward hardtanh "
    "hardtanh_backward huber_loss_backward hypot i0 kl_div leaky_relu leaky_relu_backward lerp lgamma log log10 log1p "
    "log2 log_sigmoid_backward log_sigmoid_forward logit_backward masked_fill mse_loss_backward mul nan_to_num neg "
    "nextafter polar positive reciprocal relu remainder round sigmoid_backward sign sin sinc smooth_l1_loss_backward "
    "softshrink sqrt square tan tanh tanh_backward threshold threshold_backward trunc where xlogy"
)

# Elementwise operations that differ on a CPU, or do for some arguments. A GPU has no vector code for them: every
# element, also in the last and incomplete part of a tensor, is computed by the same scalar code in a thread of its own.
_POINTWISE_ON_GPU = _aten(
    "add atan2 atanh celu cosh elu elu_backward exp2 floor_divide gelu gelu_backward logaddexp logaddexp2 logit mish "
    "mish_backward pow rsqrt rsub selu sigmoid silu silu_backward sinh softplus softplus_backward sub"
)

_ON_ALL_DEVICES = frozenset().union(_VIEWS, _COPIES, _CONSTANTS, _ANSWERS, _CHOICES, _POINTWISE)
INVARIANT: frozenset[str] = _ON_ALL_DEVICES.union(_RUNNING, _SCATTERED, _ROWS, _LOSSES)
"""On a CPU."""
# Scans, scattered sums, rows and losses are absent: on a GPU, threads share such a sum, in an order of the sizes or of
# their arrival.
INVARIANT_ON_GPU: frozenset[str] = _ON_ALL_DEVICES | _POINTWISE_ON_GPU


def _is_integer_only(arguments: dict) -> bool:
    """Whether all values are integers and stay integers: their sums, products and quotients are exact."""
    values = tree_leaves(list(arguments.values()))
    dtypes = [value.dtype if isinstance(value, torch.Tensor) else value for value in values]
    return not any(
        isinstance(value, float) or (isinstance(value, torch.dtype) and value.is_floating_point) for value in dtypes
    )


def _scaled_exactly(arguments: dict) -> bool:
    """Whether alpha is 1 or -1. For other values, vector and scalar code round alpha * x differently."""
    return arguments.get("alpha", 1) in (1, -1) or _is_integer_only(arguments)


def _simple_power(arguments: dict) -> bool:
    """Whether torch computes the power by products, quotients or square roots; other powers are approximated."""
    exponent = arguments["exponent"]
    simple = not isinstance(exponent, torch.Tensor) and exponent in EXACT_POWERS
    return simple or _is_integer_only(arguments)


def _does_not_race(arguments: dict) -> bool:
    """Whether no two threads add to one element in random order; deterministic algorithms prevent this."""
    return not arguments.get("accumulate", False) or torch.are_deterministic_algorithms_enabled()


def _only_moves(arguments: dict) -> bool:
    return "reduce" not in arguments


# Operations that are invariant for some arguments.
CONDITIONS: dict[str, Callable[[dict], bool]] = {
    "aten::_index_put_impl": _does_not_race,
    "aten::add": _scaled_exactly,
    "aten::arange": _is_integer_only,
    "aten::floor_divide": _is_integer_only,
    "aten::index_put": _does_not_race,
    "aten::pow": _simple_power,
    "aten::prod": _is_integer_only,
    "aten::rsub": _scaled_exactly,
    "aten::scatter": _only_moves,
    "aten::sub": _scaled_exactly,
    "aten::sum": _is_integer_only,
}


def is_invariant(op: torch._ops.OpOverload, args: tuple = (), kwargs: dict | None = None) -> bool:
    """Whether torch's own kernel is known to be invariant for this call of an aten operation.

    The lists for a GPU hold if one of the arguments is on a GPU.
    """
    name = op._schema.name if op._schema.name.endswith("__") else op._schema.name.removesuffix("_")
    on_gpu = any(isinstance(value, torch.Tensor) and value.is_cuda for value in tree_leaves((args, kwargs)))
    if name in (INVARIANT_ON_GPU if on_gpu else INVARIANT):
        return True
    if name not in CONDITIONS:
        return False
    names = [argument.name for argument in op._schema.arguments]
    return CONDITIONS[name](dict(zip(names, args, strict=False)) | (kwargs or {}))
