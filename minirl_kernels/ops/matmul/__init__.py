from .op import bmm, linear, matmul

__all__ = ["bmm", "linear", "matmul"]
