from .advantages import group_advantages
from .metrics import PolicyLossMetrics
from .op import PolicyLossOutput, policy_loss

__all__ = ["PolicyLossMetrics", "PolicyLossOutput", "group_advantages", "policy_loss"]
