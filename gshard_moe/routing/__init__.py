"""Routing: logits to the experts that each token asks for, on global arrays."""

from gshard_moe.routing.contract import Order, Routing
from gshard_moe.routing.forced import forced
from gshard_moe.routing.top_k import router_logits, router_stats, top_k

__all__ = ["Order", "Routing", "forced", "router_logits", "router_stats", "top_k"]
