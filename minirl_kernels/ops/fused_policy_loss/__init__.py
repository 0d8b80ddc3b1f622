from .op import fused_policy_loss

__all__ = ["fused_policy_loss"]
