from .op import fused_linear_policy_loss

__all__ = ["fused_linear_policy_loss"]
