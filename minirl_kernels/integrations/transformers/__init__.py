"""Connects models of transformers to this library's kernels.

Importing it registers `experts_implementation="minirl"` and `attn_implementation="minirl"`.
"""

from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from ...versions import require_transformers
from .attention import attention_forward, attention_mask
from .batch_invariance import check_batch_invariant
from .experts import experts_forward
from .log_probs import disable_log_probs, enable_log_probs
from .packing import packing_leak, refuse_packed

__all__ = ["check_batch_invariant", "disable_log_probs", "enable_log_probs", "packing_leak", "refuse_packed"]

require_transformers()

ALL_EXPERTS_FUNCTIONS.register("minirl", experts_forward)
AttentionInterface.register("minirl", attention_forward)
# Without a registered mask function, transformers would pass no mask, even for a padded batch.
AttentionMaskInterface.register("minirl", attention_mask)
