from .advantages import group_advantages
from .inputs import PolicyLossInputs
from .metrics import PolicyLossMetrics
from .op import PolicyLossOutput, policy_loss

__all__ = ["PolicyLossInputs", "PolicyLossMetrics", "PolicyLossOutput", "group_advantages", "policy_loss"]
