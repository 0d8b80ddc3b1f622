"""Routing replay for models: record the experts of each token, carry them between engines, and replay them."""

from .replay import record_routing, replay_routing
from .routed_experts import RoutedExperts
from .routers import moe_layer_indices

__all__ = ["RoutedExperts", "moe_layer_indices", "record_routing", "replay_routing"]
