"""Exchange on two levels: a token crosses the slow links once for a node, not once for an expert.

Nodes are served as experts are. Each group's tokens go into lists, one for a node: a token is in
the list of every node that has an expert of its own. Lists are sent between nodes. There each list
is a group of tokens, which the exchange of one level takes to the node's experts; its sum over them
is what is sent back, and the token adds up its nodes. So both levels are the same slots, gathered
and added, and the backward, which sends gradients of tokens where tokens went, is the forward with
another middle. Nothing more is dropped: a list has a place for all that can be served.

The sum over a node's experts is rounded to the dtype of the tokens before it travels; in float32 it
differs from one level's by the order of the sum.

A nodes, Z places of a list, e experts that a device has, g groups of tokens on a device, X lists
that it gets (A * g), m the model width that travels.

Source: DeepSeek-V3, arXiv 2412.19437, section 3.2.2, and its DeepEP (a token is sent once to a
node); Tutel, arXiv 2206.03382, section 4.3 (two levels, without that).
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Key

from gshard_moe import config as configs
from gshard_moe.dispatch import Slots, gather
from gshard_moe.exchange import levels
from gshard_moe.exchange.all_to_all import Layer, carry, key_impl, part_of, with_slots
from gshard_moe.exchange.all_to_all import exchange as one_level
from gshard_moe.exchange.part import Part, Weights
from gshard_moe.experts import ExpertWeights
from gshard_moe.layout import Layout


def exchange(
    x_GSM: Float[Array, "G S M"],
    slots: Slots,
    weights: ExpertWeights,
    *,
    config: configs.MoEConfig,
    layout: Layout,
    dropout_key_G: Key[Array, " G"] | None = None,
    fewer: bool = False,
) -> Float[Array, "G S M"]:
    """Takes tokens to their experts' nodes, there to the experts, and the results back.

    Where the card has weights travel, or there is one node, this is the exchange of one level.

    Args:
      x_GSM: the tokens.
      slots: who goes where.
      weights: of all experts, as stored.
      config: of the experts.
      layout: on a mesh, with `levels`; `Layout.check_exchange` finds nothing.
      dropout_key_G: a key for each group, where hidden units are dropped.
      fewer: takes fewer chunks where there cannot be as many.
    Returns:
      The weighted sum of each token's served experts.
    Raises:
      ValueError: if there are more chunks than experts on a device and than slots.
    """
    part = part_of(x_GSM, slots, weights, config=config, layout=layout)
    if not part.on_two_levels:
        return one_level(
            x_GSM,
            slots,
            weights,
            config=config,
            layout=layout,
            dropout_key_G=dropout_key_G,
            fewer=fewer,
        )
    node, local = part.experts
    plan = of_nodes(slots, part.sizes[node])
    gate_EGC, key_EGC2 = with_slots(slots, dropout_key_G)
    inside = dataclasses.replace(part, experts=(local,))
    again = layout.config.compute.computes_again
    within = Layer(inside, config, fewer, again, key_impl(dropout_key_G))
    lists_AGZM = layout.constrain("slots_source", gather.dispatch(x_GSM, plan.lists))
    extras = plan.place_EGC, plan.slot_AGZK, key_EGC2
    sums_AGZM = carry(_Levels(within, node), lists_AGZM, gate_EGC, extras, weights, layout)
    with jax.named_scope("combine"):
        return gather.add(layout.constrain("slots_source", sums_AGZM), plan.lists)


class Plan(NamedTuple):
    """Which tokens go to each node, and where they go there; -1 is an empty place, or nobody.

    Attributes:
      lists: of the nodes, as of experts with Z slots: the token in each place, and the places of
        each token, as a * Z + z.
      place_EGC: where the token of each slot is in the list of its expert's node.
      slot_AGZK: the slots of each token of a list among its node's, as e * C + c.
    """

    lists: Slots
    place_EGC: Int[Array, "E G C"]
    slot_AGZK: Int[Array, "A G Z K"]


def of_nodes(slots: Slots, num_nodes: int) -> Plan:
    """Lists each node's tokens, every one of them once, in the order of tokens.

    Args:
      slots: who goes to which expert.
      num_nodes: A; nodes have equally many experts, one after the other.
    """
    num_groups, num_experts, capacity = slots.token_GEC.shape
    num_tokens, num_choices = slots.slot_GSK.shape[1:]
    of_node = num_experts // num_nodes
    places = levels.list_length(num_tokens, of_node, capacity)
    node_GSK = jnp.where(slots.slot_GSK >= 0, slots.slot_GSK // (of_node * capacity), -1)
    there_GAS = (node_GSK[:, None] == jnp.arange(num_nodes)[None, :, None, None]).any(axis=-1)
    place_GAS = jnp.where(there_GAS, there_GAS.cumsum(axis=-1) - 1, -1)
    # A stable sort puts those that go to a node first.
    token_GAZ = jnp.argsort(~there_GAS, axis=-1, stable=True)[..., :places]
    used_GA1 = there_GAS.sum(axis=-1, keepdims=True)
    token_GAZ = jnp.where(jnp.arange(places)[None, None] < used_GA1, token_GAZ, -1)
    first_A = jnp.arange(num_nodes) * places
    slot_GAS = jnp.where(place_GAS >= 0, first_A[None, :, None] + place_GAS, -1)
    slot_GSA = _packed(slot_GAS.swapaxes(1, 2), min(num_nodes, num_choices))
    lists = Slots(token_GAZ, slot_GSA, (slot_GSA >= 0).astype(jnp.float32))
    # On the node, a slot's token is known by its place, and a place by its slots.
    token_GAX = slots.token_GEC.reshape(num_groups, num_nodes, -1)
    place_GAX = jnp.take_along_axis(place_GAS, jnp.maximum(token_GAX, 0), axis=-1)
    place_GEC = jnp.where(token_GAX >= 0, place_GAX, -1).reshape(slots.token_GEC.shape)
    pick = jax.vmap(lambda slot_SK, token_AZ: slot_SK[token_AZ])
    slot_GAZK = pick(slots.slot_GSK, jnp.maximum(token_GAZ, 0))
    slot_GAZK -= (jnp.arange(num_nodes) * of_node * capacity)[None, :, None, None]
    mine_GAZK = (slot_GAZK >= 0) & (slot_GAZK < of_node * capacity)
    mine_GAZK &= (token_GAZ >= 0)[..., None]
    slot_GAZK = _packed(jnp.where(mine_GAZK, slot_GAZK, -1), num_choices)
    return Plan(lists, place_GEC.swapaxes(0, 1), slot_GAZK.swapaxes(0, 1))


def _packed(slot_XK: jax.Array, most: int) -> jax.Array:
    """Leaves out what is not there, but for `most` in all: no more can be there."""
    if slot_XK.shape[-1] == most:
        return slot_XK
    return -jnp.sort(-slot_XK, axis=-1)[..., :most]


@dataclasses.dataclass(frozen=True)
class _Levels:
    """One layer on one device: what `Layer` is to slots, this is to lists.

    Attributes:
      within: the exchange of one level, between the devices of a node.
      node: the axis between nodes.
    """

    within: Layer
    node: str

    @property
    def part(self) -> Part:
        """Who the device's peers are, once tokens are on their node."""
        return self.within.part

    @property
    def again(self) -> bool:
        """Whether the backward gets the lists, and not what `forward` keeps."""
        return self.within.again

    @property
    def kept_spec(self) -> tuple[P, P]:
        """How devices differ in what they keep: in what they compute, and in what they got."""
        return self.within.kept_spec, P(self.part.groups)

    def forward(
        self, lists_AgZm: jax.Array, gates: jax.Array, extras: tuple, held: Weights
    ) -> tuple[jax.Array, tuple]:
        """Returns the lists' sums, and what the backward needs: what has come with them stays."""
        slots, keys = self._received(extras)
        gates, xs_eXCm = self._sent(gates), self._dispatched(lists_AgZm, slots)
        ys_eXCm, kept = self.within.forward(xs_eXCm, gates, keys, held)
        return self._combined(ys_eXCm, slots), (kept, jax.tree.map(lambda x: x[None], slots))

    def backward(
        self, kept: Any, gates: jax.Array, extras: tuple, held: Weights, dsums_AgZm: jax.Array
    ) -> tuple[jax.Array, jax.Array, Weights]:
        """Returns the gradients of lists, gates and weights.

        Args:
          kept: `forward`'s; or the lists, where products are computed again.
          gates: the slots'.
          extras: what else goes with slots.
          held: the weights.
          dsums_AgZm: the gradients of the sums.
        """
        # Gates and keys that `within` keeps are not sent again: of this only the way back is run.
        gates, gates_back = jax.vjp(self._sent, gates)
        if self.again:
            slots, keys = self._received(extras)
            kept = self._dispatched(kept, slots)
        else:
            kept, slots = kept
            slots, keys = jax.tree.map(lambda x: x[0], slots), None
        dys_eXCm = self._dispatched(dsums_AgZm, slots)
        dxs_eXCm, dgates, dheld = self.within.backward(kept, gates, keys, held, dys_eXCm)
        return self._combined(dxs_eXCm, slots), gates_back(dgates)[0], dheld

    def _received(self, extras: tuple) -> tuple[Slots, jax.Array | None]:
        """Sends what goes with slots; returns who goes where in the node, and dropout's keys."""
        place_eXC, (slot_XZK,), keys = jax.tree.map(self._sent, extras)
        served_XZK = (slot_XZK >= 0).astype(jnp.float32)  # gates travel by themselves
        return Slots(place_eXC.swapaxes(0, 1), slot_XZK, served_XZK), keys

    def _dispatched(self, lists_AgZm: jax.Array, slots: Slots) -> jax.Array:
        """Sends lists to their nodes, and puts what comes into the slots of the node's experts."""
        (lists_XZm,) = self._sent(lists_AgZm)
        with jax.named_scope("dispatch"):
            return gather.dispatch(lists_XZm, slots)

    def _combined(self, ys_eXCm: jax.Array, slots: Slots) -> jax.Array:
        """Adds up each token's slots on this node, and sends the lists back: the transpose."""
        with jax.named_scope("combine"):
            sums_XZm = gather.add(ys_eXCm, slots)
        return self._sent_back(sums_XZm[None])

    def _sent(self, x: jax.Array) -> jax.Array:
        """Sends to each node its part of dim 0, and sets what comes side by side as groups."""
        x = self._swapped(x.reshape(self._nodes, -1, *x.shape[1:])).swapaxes(0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    def _sent_back(self, x: jax.Array) -> jax.Array:
        """Sends each node its groups back; the inverse of `_sent`."""
        x = x.reshape(x.shape[0], self._nodes, -1, *x.shape[2:]).swapaxes(0, 1)
        x = self._swapped(x)
        return x.reshape(-1, *x.shape[2:])

    def _swapped(self, x: jax.Array) -> jax.Array:
        with jax.named_scope("exchange"):
            return jax.lax.all_to_all(x, self.node, split_axis=0, concat_axis=0)

    @property
    def _nodes(self) -> int:
        return self.part.sizes[self.node]
