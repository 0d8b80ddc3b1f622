from .op import mean, sum

__all__ = ["mean", "sum"]
