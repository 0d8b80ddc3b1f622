"""Batch-invariant layers: the result of a row depends on that row alone, bit for bit."""

from .ops.attention import attention
from .ops.elementwise import gelu, mish, sigmoid, silu, softplus
from .ops.matmul import bmm, linear, matmul
from .ops.mean import mean, sum
from .ops.rms_norm import rms_norm
from .ops.softmax import log_softmax, softmax

__all__ = [
    "attention",
    "bmm",
    "gelu",
    "linear",
    "log_softmax",
    "matmul",
    "mean",
    "mish",
    "rms_norm",
    "sigmoid",
    "silu",
    "softmax",
    "softplus",
    "sum",
]
