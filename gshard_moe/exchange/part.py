"""A device's part of an MoE layer, inside `shard_map`: who its peers are, and what goes to them.

The D devices of the expert axes are seen as A groups of F: tokens cross from group to group,
weights are shared inside a group. Of the F devices of a group, R hand weights on in a ring and I
gather what arrives. Device (a, r, i) has number (a * R + r) * I + i, and stores the experts of that
number.

Source: GShard, arXiv 2006.16668, section 3.2 (F = 1); Janus, doi 10.1145/3603269.3604869 (F = D);
HybridEP, arXiv 2510.19470 (what is between).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from gshard_moe import config as configs
from gshard_moe.experts import ROLES
from gshard_moe.layout import Layout, by_hand

Weights = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Part:
    """The mesh axes of a layer's exchange, and how it is done.

    Attributes:
      experts: axes that E is split over on the wire.
      groups: axes that the tokens' groups are split over.
      width: axes that M is split over on the wire.
      hidden: axes that H is split over.
      gather: of each weight, the dims that are gathered for its use, with their axes.
      sizes: of the axes; 1 of one that is not free.
      fetch: F, devices that share weights.
      config: of the exchange.
    """

    experts: tuple[str, ...]
    groups: tuple[str, ...]
    width: tuple[str, ...]
    hidden: tuple[str, ...]
    gather: dict[str, tuple[tuple[int, tuple[str, ...]], ...]]
    sizes: dict[str, int]
    fetch: int
    config: configs.ExchangeConfig

    @classmethod
    def of(cls, layout: Layout, fetch: int, free: Sequence[str]) -> "Part":
        """Returns the part of each device of a layout, of which these axes are free."""

        def axes(role: str, letter: str) -> tuple[str, ...]:
            return tuple(axis for axis in layout.axes_of(role, letter) if axis in free)

        gather = {name: layout.gathered(role, free) for name, role in ROLES.items()}
        return cls(
            axes("slots_wire", "E"),
            axes("slots_source", "G"),
            axes("slots_wire", "M"),
            axes("slots_hidden", "H"),
            gather,
            {axis: size if axis in free else 1 for axis, size in layout.axis_sizes.items()},
            fetch,
            layout.config.exchange,
        )

    @property
    def devices(self) -> int:
        """D."""
        return math.prod(self.sizes[axis] for axis in self.experts)

    @property
    def across(self) -> int:
        """A, the groups that tokens cross between."""
        return self.devices // self.fetch

    @property
    def ring(self) -> int:
        """R, the devices that hand weights on."""
        return self.fetch // self.inner

    @property
    def inner(self) -> int:
        """I, the devices that gather what arrives."""
        return by_hand.gathering(self.config, self.fetch, self.sizes, self.devices)

    @property
    def on_two_levels(self) -> bool:
        """Whether tokens travel on two levels: one node is one level."""
        levels = self.config.levels
        return self.fetch == 1 and self.experts == levels != () and self.sizes[levels[0]] > 1

    @property
    def pieces(self) -> int:
        """Into how many a step's slots are cut; where nothing travels there is nothing to hide."""
        return self.config.chunks if self.across > 1 or self.hidden else 1

    @property
    def axes(self) -> tuple[str, ...]:
        """All axes that anything here varies over."""
        named = {*self.experts, *self.groups, *self.width, *self.hidden}
        return tuple(axis for axis in self.sizes if axis in named)

    def at(self, step: int) -> jax.Array | int:
        """Returns which of its group's R blocks of experts a device has at a step of the ring."""
        if self.ring == 1:
            return 0
        return (jax.lax.axis_index(self.experts) // self.inner + step) % self.ring

    def swap(self, x: jax.Array) -> jax.Array:
        """Sends [A, ...], a part to each group; gets one from each. Its own inverse."""
        if self.across == 1:
            return x
        inside = None
        if self.fetch > 1:
            inside = [[a * self.fetch + f for a in range(self.across)] for f in range(self.fetch)]
        with jax.named_scope("exchange"):
            return jax.lax.all_to_all(
                x, self.experts, split_axis=0, concat_axis=0, axis_index_groups=inside
            )

    def whole(self, x: jax.Array) -> jax.Array:
        """Gathers the model width, of the last dim; else marks what differs along the hidden axes.

        The transpose of `summed`.
        """
        if self.width:
            with jax.named_scope("exchange"):
                return jax.lax.all_gather(x, self.width, axis=x.ndim - 1, tiled=True)
        return vary(x, self.hidden)

    def summed(self, x: jax.Array) -> jax.Array:
        """Sums over the hidden axes, and scatters the model width; the transpose of `whole`."""
        with jax.named_scope("exchange"):
            if self.width:
                dim = x.ndim - 1
                return jax.lax.psum_scatter(x, self.width, scatter_dimension=dim, tiled=True)
            return jax.lax.psum(x, self.hidden) if self.hidden else x

    def used(self, held: Weights, dtype: jnp.dtype) -> Weights:
        """Returns the weights of this device's experts as they are multiplied, in this dtype."""

        def use(name: str, weight: jax.Array) -> jax.Array:
            weight = vary(weight.astype(dtype), self.axes)
            for dim, axes in self.gather[name]:
                weight = jax.lax.all_gather(weight, axes, axis=dim, tiled=True)
            return weight

        with jax.named_scope("exchange"):
            return {name: use(name, weight) for name, weight in held.items()}

    def handed_on(self, weights: Weights) -> Weights:
        """Sends what a device has to the one before it in its ring: r gets what r + 1 had."""

        def source(number: int) -> int:
            r = number // self.inner % self.ring
            return number + ((r + 1) % self.ring - r) * self.inner

        pairs = [(source(number), number) for number in range(self.devices)]
        send = functools.partial(jax.lax.ppermute, axis_name=self.experts, perm=pairs)
        with jax.named_scope("exchange"):
            return jax.tree.map(send, weights)

    def gathered(self, weights: Weights) -> Weights:
        """Returns the weights of the I devices that gather, one after the other in dim 0."""
        return self._inside(functools.partial(jax.lax.all_gather, axis=0), weights)

    def scattered(self, gradients: Weights) -> Weights:
        """Sums gradients of what was `gathered`; a device gets those of what it gave."""
        return self._inside(functools.partial(jax.lax.psum_scatter, scatter_dimension=0), gradients)

    def _inside(self, collective: Callable, weights: Weights) -> Weights:
        """Runs a collective among the I devices that gather."""
        if self.inner == 1:
            return weights
        run = functools.partial(
            collective, axis_name=self.experts, tiled=True, axis_index_groups=self._gathering
        )
        with jax.named_scope("exchange"):
            return jax.tree.map(run, weights)

    @property
    def _gathering(self) -> list[list[int]] | None:
        if self.inner == self.devices:
            return None
        return [list(range(i, i + self.inner)) for i in range(0, self.devices, self.inner)]


def vary(x: jax.Array, axes: Sequence[str]) -> jax.Array:
    """Marks an array as varying over these axes; its gradient is summed over those that are new."""
    new = tuple(axis for axis in axes if axis not in jax.typeof(x).manual_axis_type.varying)
    return jax.lax.pcast(x, new, to="varying") if new else x
