"""Causal language models of transformers that return log-probabilities, entropy and the policy loss instead of logits.

The model's own forward runs, also if it was replaced, with one change: its head stores the hidden states and computes
no logits. The linear losses then use these hidden states and the head's weight.
"""

from .after_head import AfterHead
from .enable import after_head, disable_log_probs, enable_log_probs

__all__ = ["AfterHead", "after_head", "disable_log_probs", "enable_log_probs"]
