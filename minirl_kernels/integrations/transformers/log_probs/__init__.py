"""Causal language models of transformers that return log-probabilities, entropy and the policy loss instead of logits.

The model's own forward runs, whatever it is by then, with one change: its head keeps the hidden states that it is given
and makes no logits. The linear losses take these with the head's weight.
"""

from .after_head import AfterHead
from .enable import after_head, disable_log_probs, enable_log_probs

__all__ = ["AfterHead", "after_head", "disable_log_probs", "enable_log_probs"]
