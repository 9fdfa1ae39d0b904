"""Exchange of rows: each token's vector travels to its experts' devices, and nothing else does.

One `shard_map`. A device sorts its tokens' served choices by expert. Where it has every expert
(they may be stored split, and gathered for their use), it runs its rows through them, and that is
all. Else what goes to another device is one slice of its rows: it tells each how many rows of each
of its experts come; sends them; and sorts what arrives by expert again, which is a merge of sorted
slices. The experts' results go back the same way. Buffers are as long as the model card lets them
become, so nothing is dropped here; what is empty is not sent.

With a hidden dim split over another axis (tensor parallelism), `M/model` in `slots_wire` lets each
of its devices send a part of the model width, gather the rest where it arrives, and scatter the
partial sums before they return; otherwise every one of them sends the whole row.

D devices of the expert axes; e experts, g groups of S tokens with K choices, T tokens, h hidden and
m model width of a device; R rows that it sends, A rows that it receives.
Source: MegaBlocks, arXiv 2211.15841 (dropless); GShard, arXiv 2006.16668, section 3.2 (the way).
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Key

from gshard_moe import config as configs
from gshard_moe import experts
from gshard_moe import layout as layouts
from gshard_moe.dispatch import Rows, Served, rows
from gshard_moe.exchange import local_experts, on_devices
from gshard_moe.exchange import ragged_all_to_all as ways
from gshard_moe.exchange.local_experts import Experts
from gshard_moe.exchange.ragged_all_to_all import Route, ragged_all_to_all
from gshard_moe.exchange.sizes import KEY
from gshard_moe.experts import ROLES, ExpertWeights
from gshard_moe.layout import Layout, LayoutError, traffic
from gshard_moe.layout.traffic import Collective


def exchange(
    x_GSM: Float[Array, "G S M"],
    served: Served,
    weights: ExpertWeights,
    *,
    config: configs.MoEConfig,
    layout: Layout | None,
    slots_of_group: int | None = None,
    distinct: bool = True,
    dropout_key_G: Key[Array, " G"] | None = None,
) -> Float[Array, "G S M"]:
    """Takes tokens to their experts and back, as rows; they stay where E is not split.

    Args:
      x_GSM: the tokens.
      served: who goes to which expert.
      weights: of all experts, as stored.
      config: of the experts.
      layout: where; `Layout.check_exchange` finds nothing. None: all of it on one device.
      slots_of_group: choices of a group that can be served at most, an equal share of them by each
        expert; None: all.
      distinct: a token's experts are; else more room is needed for what may come.
      dropout_key_G: a key for each group, where hidden units are dropped.
    Returns:
      The weighted sum of each token's served experts.
    Raises:
      LayoutError: if a dim of a weight does not divide by its axes, or a caller's `shard_map` has
        taken an axis of E.
    """
    axes, held = expert_axes(layout), weights.held()
    emulated = layouts.platform_of(layout) == "cpu"
    here = _Here(axes, Experts.of(layout, travel=axes != ()), emulated, slots_of_group, distinct)
    spec_of_weights = {}
    if layout is not None:
        _refuse_taken(layout, axes)
        for name, weight in held.items():
            layout.require_divisible(ROLES[name], weight.shape)
        spec_of_weights = {name: layout.spec(ROLES[name]) for name in held}
    groups = on_devices.axes_of(layout, "groups", "G")
    tokens = P(groups, None, here.experts.width or None)
    fixed = P(groups), None if dropout_key_G is None else P(groups)
    run = functools.partial(_on_a_device, here=here, config=config)
    specs = tokens, P(groups), spec_of_weights, fixed
    run = on_devices.differentiably(layout, run, specs, tokens)
    return run(x_GSM, served.gate_GSK, held, (served.expert_GSK, dropout_key_G))


class _Here(NamedTuple):
    """What a layout says of a device.

    Attributes:
      axes: those that E is split over; none: every device has all experts.
      experts: how the device runs its own.
      emulated: the platform has no ragged all-to-all.
      slots_of_group: choices of a group that can be served at most; None: all.
      distinct: a token's experts are.
    """

    axes: tuple[str, ...]
    experts: Experts
    emulated: bool
    slots_of_group: int | None
    distinct: bool


def expert_axes(layout: Layout | None) -> tuple[str, ...]:
    """Returns the axes, of more than one device, that E is split over where experts are used."""
    if layout is None:
        return ()
    sizes = layout.axis_sizes
    return tuple(axis for axis in layout.axes_of("expert_in", "E", "used") if sizes[axis] > 1)


def _refuse_taken(layout: Layout, axes: tuple[str, ...]) -> None:
    """Refuses to send over axes of a caller's `shard_map`: its experts may not be all of them."""
    free = on_devices.free_of(layout, axes)
    taken = [axis for axis in axes if axis not in free]
    if taken:
        raise LayoutError(
            f'{layout.source}: exchange.tokens: "ragged" sends over the axes of E by a shard_map '
            f"of its own; got E/{'/'.join(axes)}, inside a shard_map over "
            f"{', '.join(taken)}; leave {', '.join(taken)} out of its axis_names"
        )


def _on_a_device(
    x_gSm: jax.Array,
    gate_gSK: jax.Array,
    held: dict[str, jax.Array],
    fixed: tuple[jax.Array, jax.Array | None],
    *,
    here: _Here,
    config: configs.MoEConfig,
) -> jax.Array:
    """Takes one device's tokens to their experts, runs its own experts, and combines."""
    expert_gSK, dropout_key_g = fixed
    expert_TK = expert_gSK.reshape(-1, expert_gSK.shape[2])
    num_sent, num_received = _longest(
        expert_gSK.shape,
        config.num_experts,
        here.slots_of_group,
        jax.lax.axis_size(here.axes) if here.axes else 1,
        distinct=here.distinct,
    )
    with jax.named_scope("dispatch"):
        found = rows.sort_by_expert(
            expert_TK,
            num_experts=config.num_experts,
            max_rows=num_sent,
            room=0 if here.axes else here.experts.room,
        )
        xs_Rm = rows.dispatch(x_gSm.reshape(-1, x_gSm.shape[-1]), found)
        key_R = None if dropout_key_g is None else _keys(dropout_key_g, found, config)

    def run(xs_Am: jax.Array, order: Rows, key_A: jax.Array | None) -> jax.Array:
        return local_experts.run(xs_Am, held, order, here.experts, config, key_A)

    if here.axes:
        ys_Rm = _there_and_back(xs_Rm, found.count_E, key_R, num_received, here, run)
    else:
        ys_Rm = run(xs_Rm, found, key_R)
    with jax.named_scope("combine"):
        # A gate's gradient is summed over the parts of the width.
        ys_Rm, gate_TK = experts.varying_alike(ys_Rm, gate_gSK.reshape(expert_TK.shape))
        return rows.combine(ys_Rm, gate_TK, found).reshape(x_gSm.shape)


def _there_and_back(
    xs_Rm: jax.Array,
    count_E: jax.Array,
    key_R: jax.Array | None,
    num_received: int,
    here: _Here,
    run: Callable[[jax.Array, Rows, jax.Array | None], jax.Array],
) -> jax.Array:
    """Sends rows to their experts, and what becomes of them back.

    Args:
      xs_Rm: sorted by expert.
      count_E: rows of each.
      key_R: travels with each row.
      num_received: how many may arrive here.
      here: what the layout says.
      run: a device's own experts, over rows sorted by them.
    """
    with jax.named_scope("exchange"):
        route, count_De = _announce(count_E, here.axes)
        send = functools.partial(_sent, here=here)
        xs_Am = send(xs_Rm, num_received, route)
    order, key_A = _by_expert(count_De, num_received, here.experts.room), None
    if key_R is not None:
        with jax.named_scope("exchange"):
            words_A = send(jax.random.key_data(key_R), num_received, route)
            words_A = words_A.at[jnp.maximum(order.choice_R, 0)].get(mode="clip")
            key_A = jax.random.wrap_key_data(words_A, impl=jax.random.key_impl(key_R))
    with jax.named_scope("dispatch"):
        xs_Am = rows.dispatch(xs_Am, order)
    ys_Am = run(xs_Am, order, key_A)
    with jax.named_scope("combine"):
        ys_Am = rows.dispatch(ys_Am, _unsorted(order, num_received))
    with jax.named_scope("exchange"):
        return send(ys_Am, xs_Rm.shape[0], ways.turned(route))


def _longest(
    shape_gSK: Sequence[int],
    num_experts: int,
    slots_of_group: int | None,
    parts: int,
    *,
    distinct: bool = True,
) -> tuple[int, int]:
    """Returns how many rows a device sends, and receives from all `parts` of them, at most."""
    groups, tokens, top_k = shape_gSK
    sent = groups * tokens * top_k
    # A token goes to each of a device's experts once, if its experts are distinct.
    from_one = groups * tokens * (min(top_k, num_experts // parts) if distinct else top_k)
    if slots_of_group is not None:
        sent = min(sent, groups * slots_of_group)
        from_one = min(from_one, groups * slots_of_group // parts)
    return sent, parts * from_one


def _announce(count_E: jax.Array, axes: tuple[str, ...]) -> tuple[Route, jax.Array]:
    """Tells every device what comes to it, and is told where it is to go there.

    Returns:
      The route, and how many rows of each of this device's experts come from each device [D, e].
    """
    parts = jax.lax.axis_size(axes)
    count_De = count_E.reshape(parts, -1)
    send_D = count_De.sum(axis=1)
    begin_D = jnp.cumsum(send_D) - send_D
    told = jnp.concatenate([count_De, begin_D[:, None]], axis=1)
    told = jax.lax.all_to_all(told, axes, 0, 0, tiled=True)
    count_De, origin_D = told[:, :-1], told[:, -1]
    recv_D = count_De.sum(axis=1)
    landing_D = jnp.cumsum(recv_D) - recv_D
    output_D = jax.lax.all_to_all(landing_D, axes, 0, 0, tiled=True)
    return Route(begin_D, send_D, output_D, recv_D, landing_D, origin_D), count_De


def _sent(rows_RX: jax.Array, num_rows: int, route: Route, *, here: _Here) -> jax.Array:
    """Sends rows; of the `num_rows` that may arrive, those that do not are zero."""
    return ragged_all_to_all(
        rows_RX,
        jnp.zeros((num_rows, *rows_RX.shape[1:]), rows_RX.dtype),
        route,
        axis_name=here.axes,
        emulated=here.emulated,
    )


def _by_expert(count_De: jax.Array, num_rows: int, room: int) -> Rows:
    """Returns how rows that arrived, by device and then by expert, are sorted by expert.

    Its choices are the rows that arrived, one for each "token".
    """
    parts, num_experts = count_De.shape
    count_X = count_De.reshape(-1)
    arrived_X = jnp.cumsum(count_X) - count_X  # where each device's rows of an expert begin
    count_Y = count_De.T.reshape(-1)
    sorted_Y = jnp.cumsum(count_Y) - count_Y

    to_arrived_Y = arrived_X.reshape(parts, num_experts).T.reshape(-1)
    to_sorted_X = sorted_Y.reshape(num_experts, parts).T.reshape(-1)
    return Rows(
        _followed(count_Y, sorted_Y, to_arrived_Y, num_rows + room),
        _followed(count_X, arrived_X, to_sorted_X, num_rows)[:, None],
        count_De.sum(axis=0),
    )


def _followed(count_X: jax.Array, begin_X: jax.Array, there_X: jax.Array, length: int) -> jax.Array:
    """Returns each row's place in another order, of runs of rows that both have; -1 past the end.

    Args:
      count_X: rows of each run.
      begin_X: where it begins in the one order.
      there_X: where it begins in the other.
      length: of the one order.
    """
    row_R = jnp.arange(length)
    shift_R = (there_X - begin_X)[local_experts.run_of_rows(count_X, length)]
    return jnp.where(row_R < count_X.sum(), row_R + shift_R, -1)


def _unsorted(order: Rows, num_rows: int) -> Rows:
    """Returns the way back from the order of experts."""
    return Rows(order.row_TK[:num_rows, 0], order.choice_R[:, None], order.count_E)


def _keys(key_g: jax.Array, found: Rows, config: configs.MoEConfig) -> jax.Array:
    """Returns each row's key: see `experts.dropped`."""
    tokens, top_k = found.row_TK.shape
    token_R, of_group = found.choice_R // top_k, tokens // key_g.shape[0]
    choice_R = token_R % of_group * config.num_experts + local_experts.expert_of_rows(found)
    return jax.vmap(jax.random.fold_in)(key_g[token_R // of_group], choice_R)


def collectives(
    layout: Layout,
    shapes: Mapping[str, Sequence[int]],
    itemsize: int,
    *,
    dropout: bool,
    recomputed: bool,
) -> list[Collective]:
    """Returns what one MoE layer's rows send in a training step, beside its weights.

    Of rows, what is sent depends on the routing. Counted is the balanced case: each device serves
    as many of its choices as there can be, and (D - 1) / D of them by other devices. What a hidden
    dim that is split adds up is whole buffers, as long as the rows of any routing.

    Args:
      layout: on a mesh.
      shapes: of the roles `groups`, `choices`, `slots` and `rows`, of all devices.
      itemsize: bytes of one element.
      dropout: a key travels with each row.
      recomputed: the backward runs the forward again, and its exchange with it.
    """
    axes = expert_axes(layout)
    how = Experts.of(layout, travel=axes != ())
    if not axes:
        held = traffic.held_bytes(layout, "rows", shapes["rows"], itemsize)
        sums = traffic.one(layout, "all-reduce", how.hidden, held, "rows")
        return traffic.times(sums, 2 + recomputed)
    num_experts, _, capacity, width = shapes["slots"]
    parts = math.prod(layout.axis_sizes[axis] for axis in axes)
    choices = layout.shape_per_device("choices", shapes["choices"])
    sent, received = _longest(choices, num_experts, num_experts * capacity, parts)
    of_width = math.prod(layout.axis_sizes[axis] for axis in how.width)

    def one(kind: traffic.Kind, over: Sequence[str], held: int, role: str) -> list[Collective]:
        return traffic.one(layout, kind, over, held, role)

    told = one("all-to-all", axes, 4 * (num_experts + parts), "rows")
    told += one("all-to-all", axes, 4 * parts, "rows")
    way = one("ragged-all-to-all", axes, sent * width // of_width * itemsize, "rows")
    keys = one("ragged-all-to-all", axes, sent * KEY, "rows") if dropout else []
    summed = [axis for axis in how.hidden if axis not in how.width]
    buffer = received * width * itemsize
    partial = one("all-gather", how.width, buffer, "rows")
    partial += one("reduce-scatter", how.width, buffer, "rows")
    partial += one("all-reduce", summed, buffer // of_width, "rows")
    forward = told + keys + traffic.times(way, 2) + partial
    backward = traffic.times(way, 2) + partial
    # Of the parts of the width: the gates' gradients, and the tokens and theirs, whole again.
    backward += one("all-reduce", how.width, 4 * math.prod(choices), "choices")
    apart = [axis for axis in how.width if axis not in layout.axes_of("groups", "M")]
    held = traffic.held_bytes(layout, "groups", shapes["groups"], itemsize)
    whole = traffic.times(one("all-gather", apart, held, "groups"), 2)
    return forward + backward + whole + (forward if recomputed else [])
