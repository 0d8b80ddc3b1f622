from .op import Routing, moe_routing

__all__ = ["Routing", "moe_routing"]
