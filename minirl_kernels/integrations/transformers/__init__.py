"""Models of transformers, given our calls. Importing it registers `experts_implementation="minirl"`."""

from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .experts import experts_forward
from .log_probs import enable_log_probs

__all__ = ["enable_log_probs"]

ALL_EXPERTS_FUNCTIONS.register("minirl", experts_forward)
