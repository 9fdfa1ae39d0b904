"""What a router returns: which experts each token asks for, and with what weight.

No capacity is in it: `dispatch.assign` decides who gets a slot. G groups, S tokens, K choices.
"""

import enum
from typing import NamedTuple

import jax
from jaxtyping import Array, Bool, Float, Int

from gshard_moe.losses import RouterStats


@jax.tree_util.register_static
class Order(enum.StrEnum):
    """Who is served first where an expert is full; it decides which overlaps are legal.

    TOKEN: token by token, each with all its choices; a group may be cut into parts before routing.
    CHOICE: all first choices before any second one (GShard); every part must be routed first.
    """

    TOKEN = "token"
    CHOICE = "choice"


class Routing(NamedTuple):
    """The experts that each token asks for.

    Attributes:
      expert_GSK: the experts, best first, each at most once for a token.
      gate_GSK: the weight of each, float32.
      keep_GSK: False where the choice is not to be served (padding); it takes no slot.
      order: the order in which slots are given.
      stats: sums for the losses.
    """

    expert_GSK: Int[Array, "G S K"]
    gate_GSK: Float[Array, "G S K"]
    keep_GSK: Bool[Array, "G S K"]
    order: Order
    stats: RouterStats
