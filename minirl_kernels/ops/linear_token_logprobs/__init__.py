from .op import linear_token_logprobs

__all__ = ["linear_token_logprobs"]
