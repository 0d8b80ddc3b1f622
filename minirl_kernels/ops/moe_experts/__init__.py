from .op import moe_experts, pack_experts
from .packed import PackedExperts

__all__ = ["PackedExperts", "moe_experts", "pack_experts"]
