"""Routing: logits to the experts that each token asks for, on global arrays."""

from gshard_moe.routing.bias import moved_bias
from gshard_moe.routing.contract import Order, Routing
from gshard_moe.routing.forced import forced, replayed
from gshard_moe.routing.gshard import gshard
from gshard_moe.routing.hashed import hashed
from gshard_moe.routing.logits import group_keys, jittered, noisy, router_logits
from gshard_moe.routing.route import route
from gshard_moe.routing.stats import router_stats
from gshard_moe.routing.top_k import probabilities, top_k

__all__ = [
    "Order",
    "Routing",
    "forced",
    "group_keys",
    "gshard",
    "hashed",
    "jittered",
    "moved_bias",
    "noisy",
    "probabilities",
    "replayed",
    "route",
    "router_logits",
    "router_stats",
    "top_k",
]
