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
    """Who is served first where an expert is full.

    TOKEN: token by token, each with all its choices.
    CHOICE: all first choices before any second one (GShard).
    IMPORTANCE: as CHOICE, the tokens with the largest importance first (V-MoE).
    FALLBACK: as CHOICE, but a token asks for its next choice only if the one before was dropped
      (Switch's no-token-left-behind): it gets one slot at most.
    """

    TOKEN = "token"
    CHOICE = "choice"
    IMPORTANCE = "importance"
    FALLBACK = "fallback"


class Routing(NamedTuple):
    """The experts that each token asks for.

    Attributes:
      expert_GSK: the experts, best first, each at most once for a token.
      gate_GSK: the weight of each, float32.
      keep_GSK: False where the choice is not to be served (padding); it takes no slot.
      order: the order in which slots are given.
      stats: sums for the losses.
      importance_GS: of a token, where the order asks for it.
    """

    expert_GSK: Int[Array, "G S K"]
    gate_GSK: Float[Array, "G S K"]
    keep_GSK: Bool[Array, "G S K"]
    order: Order
    stats: RouterStats
    importance_GS: Float[Array, "G S"] | None = None

    @property
    def parts_before_routing(self) -> bool:
        """Whether a group may be cut into parts that are routed and served one after the other.

        It may where a token's slots depend on earlier tokens only, so that the slots used so far
        (`assign`'s `used_GE`) are all that one part must tell the next: token by token, or with one
        choice a token. Otherwise every part must be routed before the first is served. Whole groups
        are always independent.
        """
        one_choice = self.expert_GSK.shape[-1] == 1 and self.order is not Order.IMPORTANCE
        return self.order is Order.TOKEN or one_choice


def padding_masked(
    expert_GSK: jax.Array, mask_GS: Bool[Array, "G S"] | None
) -> Bool[Array, "G S K"]:
    """Returns `keep_GSK`: True for every choice of a token that is not padding."""
    if mask_GS is None:
        return jax.numpy.ones(expert_GSK.shape, bool)
    return jax.numpy.broadcast_to(mask_GS[..., None], expert_GSK.shape)
