from .op import log_softmax, softmax

__all__ = ["log_softmax", "softmax"]
