from .op import token_logprobs

__all__ = ["token_logprobs"]
