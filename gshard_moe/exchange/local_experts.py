"""A device's own experts over the rows that it has, inside `shard_map`.

Weights are gathered here, from where they are stored, so that their gradients are scattered as they
come; a hidden dim that is split leaves partial sums, which are added up here.

A rows of a device, sorted by expert; e experts, h hidden and m model width of a device.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from gshard_moe import config as configs
from gshard_moe import experts
from gshard_moe import layout as layouts
from gshard_moe.dispatch import Rows
from gshard_moe.exchange import on_devices
from gshard_moe.experts import ROLES, ExpertWeights
from gshard_moe.layout import Layout


@dataclasses.dataclass(frozen=True)
class Experts:
    """How a layout splits the experts' network of a device.

    Attributes:
      hidden: the axes that H is split over.
      width: those of them that M is split over too, before and after; it is whole in between.
      gather: of each role of a weight, the dims to gather for its use, with their axes.
      backend: of the grouped matmul.
    """

    hidden: tuple[str, ...]
    width: tuple[str, ...]
    gather: dict[str, tuple[tuple[int, tuple[str, ...]], ...]]
    backend: configs.GroupedMatmulBackend

    @classmethod
    def of(cls, layout: Layout | None, *, travel: bool) -> "Experts":
        """Reads them from a layout; axes that a caller's `shard_map` has taken are done.

        Args:
          layout: None: of one device.
          travel: rows have a wire.
        """
        if layout is None:
            none = {role: () for role in ROLES.values()}
            return cls((), (), none, experts.choose_backend("auto", layouts.platform_of(None)))
        free = functools.partial(on_devices.free_of, layout)
        gather = {role: layout.gathered(role, free(layout.axes)) for role in ROLES.values()}
        asked = layout.config.compute.grouped_matmul
        return cls(
            tuple(free(layout.axes_of("rows_hidden", "H"))),
            tuple(free(layout.axes_of("slots_wire", "M"))) if travel else (),
            gather,
            experts.choose_backend(asked, layouts.platform_of(layout)),
        )

    @property
    def room(self) -> int:
        """Rows to spare, which save `loops` a copy; but summed over devices they would travel."""
        return experts.ROOM if self.backend == "loops" and not self.hidden else 0


def run(
    xs_Am: jax.Array,
    held: dict[str, jax.Array],
    order: Rows,
    how: Experts,
    config: configs.MoEConfig,
    key_A: jax.Array | None,
) -> jax.Array:
    """Runs each expert on its rows.

    Args:
      xs_Am: sorted by expert; the last `how.room` are nobody's.
      held: the device's part of each weight, by its name in `ExpertWeights`, as stored.
      order: whose counts are of the device's experts, and which says what rows are nobody's.
      how: the layout splits them.
      config: of the experts.
      key_A: of each row, where hidden units are dropped.
    Returns:
      The results [A, m]; rows of nobody hold anything.
    """
    if how.width:
        with jax.named_scope("exchange"):
            xs_Am = jax.lax.all_gather(xs_Am, how.width, axis=1, tiled=True)
    inner = {name: weight for name, weight in held.items() if name != "out_bias_EM"}
    with jax.named_scope("expert"):
        if how.backend == "loops" and key_A is None:
            ys_AM = _by_loops(xs_Am, inner, order, how, config)
        else:
            form = _form(xs_Am, order, how, config, key_A)
            ys_AM = experts.ffn(ExpertWeights(**inner), xs_Am, config, form)
        ys_Am = _summed(ys_AM, how)
        if "out_bias_EM" not in held:
            return ys_Am
        # Once: of a split hidden dim each device has a part of the sum.
        bias_eM = _gathered(held["out_bias_EM"], "expert_out_bias", ys_Am, how)
        bias_em = _own_part(bias_eM, how.width) if how.width else bias_eM
        return ys_Am + _bias_of_rows(bias_em, order)


def _by_loops(
    xs_AM: jax.Array,
    held: dict[str, jax.Array],
    order: Rows,
    how: Experts,
    config: configs.MoEConfig,
) -> jax.Array:
    """Runs the network, expert by expert, whole: see `experts.over_experts`."""

    def network(own: dict[str, jax.Array], x_TM: jax.Array) -> jax.Array:
        return experts.of_one_expert(ExpertWeights(**own), x_TM, config)

    # Gathered for this use and not kept: see `experts.linear`.
    @jax.checkpoint
    def gathered(xs_AM: jax.Array, held: dict[str, jax.Array], count_e: jax.Array) -> jax.Array:
        own = {name: _gathered(w, ROLES[name], xs_AM, how) for name, w in held.items()}
        return experts.over_experts(network, own, xs_AM, count_e, room=how.room)

    return gathered(xs_AM, held, order.count_E)


def _form(
    xs_AM: jax.Array,
    order: Rows,
    how: Experts,
    config: configs.MoEConfig,
    key_A: jax.Array | None,
) -> experts.Form:
    """Returns the form of a device's rows [A, ...] for the experts' network."""
    product = functools.partial(experts.grouped_matmul, backend=how.backend, room=how.room)

    def multiply(role: str, x_AX: jax.Array, *weights: jax.Array) -> list[jax.Array]:
        # Gathered for this use and not kept: see `experts.linear`.
        @jax.checkpoint
        def gathered(x_AX: jax.Array, weights: tuple, count_e: jax.Array) -> list[jax.Array]:
            weights = tuple(_gathered(weight, role, x_AX, how) for weight in weights)
            # Marked once, so that the gradient is summed once for all of them.
            x_AX = experts.varying_alike(x_AX, *weights)[0]
            return [product(x_AX, weight, count_e) for weight in weights]

        return gathered(x_AX, weights, order.count_E)

    def bias(role: str, bias_eX: jax.Array) -> jax.Array:
        return _bias_of_rows(_gathered(bias_eX, role, xs_AM, how), order)

    def drop(h_Ah: jax.Array) -> jax.Array:
        """Drops hidden units; of a split hidden dim each device draws all, and takes its own."""
        assert key_A is not None
        parts, at = on_devices.parts_and_place(how.hidden)
        return experts.dropped(h_Ah, key_A, config.expert_dropout, parts=parts, at=at)

    return experts.Form(multiply, bias, lambda h_Ah: h_Ah, None if key_A is None else drop)


def expert_of_rows(order: Rows) -> jax.Array:
    """Returns each row's expert; of rows that are left over, any."""
    return run_of_rows(order.count_E, order.choice_R.shape[0])


def run_of_rows(count_X: jax.Array, length: int) -> jax.Array:
    """Returns in which of some runs of rows each row is; past the end, the last.

    Each row counts the runs that end before it, which fuses; `jnp.repeat` is a scatter and a sum.
    """
    end_X = jnp.cumsum(count_X)
    run_R = (jnp.arange(length)[:, None] >= end_X[None]).sum(axis=1)
    return jnp.minimum(run_R, count_X.shape[0] - 1)


def _bias_of_rows(bias_eX: jax.Array, order: Rows) -> jax.Array:
    # Rows that are left over may hold anything, and have no gradient.
    return jnp.where(order.choice_R[:, None] >= 0, bias_eX[expert_of_rows(order)], 0)


def _gathered(weight: jax.Array, role: str, x: jax.Array, how: Experts) -> jax.Array:
    """Returns a weight in the dtype of the rows `x`, gathered for its use."""
    # Marked before, so that its gradient is scattered first and only then summed over other axes.
    weight = experts.varying_alike(weight.astype(x.dtype), x)[0]
    for dim, axes in how.gather[role]:
        # Over axes that tokens are not split over it is one and the same computation everywhere.
        alike = not set(axes) <= jax.typeof(x).manual_axis_type.varying
        to = "invarying" if alike else "varying"
        weight = jax.lax.all_gather(weight, axes, axis=dim, tiled=True, to=to)
    return weight


def _summed(y_AM: jax.Array, how: Experts) -> jax.Array:
    """Adds up the parts of a product over a hidden dim that is split."""
    whole = [axis for axis in how.hidden if axis not in how.width]
    y_AM = on_devices.summed(y_AM, whole)
    if not how.width:
        return y_AM
    return jax.lax.psum_scatter(y_AM, how.width, scatter_dimension=1, tiled=True)


def _own_part(x_AX: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    parts, at = on_devices.parts_and_place(axes)
    size = x_AX.shape[1] // parts
    return jax.lax.dynamic_slice_in_dim(x_AX, at * size, size, axis=1)
