"""Routing replay for models: which experts each token was sent to, recorded, carried and replayed."""

from .replay import record_routing, replay_routing
from .routed_experts import RoutedExperts
from .routers import moe_layer_indices

__all__ = ["RoutedExperts", "moe_layer_indices", "record_routing", "replay_routing"]
