from .op import gelu, mish, sigmoid, silu, softplus

__all__ = ["gelu", "mish", "sigmoid", "silu", "softplus"]
