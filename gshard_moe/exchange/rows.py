"""No exchange: every device has every expert and runs its own tokens through them, as rows.

Rows differ from device to device in number and order, so what is of rows is done by `shard_map`,
with the global arrays' row dim cut by device. Weights may be stored split, and are gathered for
their use; their hidden dim may be split for good (tensor parallelism).

G groups, S tokens, K choices, E experts, M model width, H hidden width; R rows, of all devices.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Key

from gshard_moe import config as configs
from gshard_moe import experts
from gshard_moe import layout as layouts
from gshard_moe.dispatch import Rows, Served, rows
from gshard_moe.exchange import on_devices
from gshard_moe.experts import ExpertWeights, Use
from gshard_moe.layout import Layout, traffic
from gshard_moe.layout.traffic import Collective


def exchange(
    x_GSM: Float[Array, "G S M"],
    served: Served,
    weights: ExpertWeights,
    *,
    config: configs.MoEConfig,
    layout: Layout | None,
    use: Use,
    slots_of_group: int | None = None,
    dropout_key_G: Key[Array, " G"] | None = None,
) -> Float[Array, "G S M"]:
    """Runs each token through its experts, on the device where it is.

    Args:
      x_GSM: the tokens.
      served: who goes to which expert.
      weights: of all experts, as stored.
      config: of the experts.
      layout: where; `Layout.check_exchange` finds nothing. None: all of it on one device.
      use: lays out a weight for its use.
      slots_of_group: choices of a group that can be served at most; None: all.
      dropout_key_G: a key for each group, where hidden units are dropped.
    Returns:
      The weighted sum of each token's served experts.
    """
    # Groups and rows are split alike; of the groups of a device, the rows are one list.
    split = P(on_devices.axes_of(layout, "groups", "G"))
    num_experts = config.num_experts
    asked = "auto" if layout is None else layout.config.compute.grouped_matmul
    backend = experts.choose_backend(asked, layouts.platform_of(layout))
    # Rows to spare save `loops` a copy; where rows are summed over devices, they would travel too.
    summed = on_devices.free_of(layout, on_devices.axes_of(layout, "rows_hidden", "H"))
    room = experts.ROOM if backend == "loops" and not summed else 0

    def lay(role: str, x: jax.Array) -> jax.Array:
        return x if layout is None else layout.constrain(role, x)

    def sort(expert_GSK: jax.Array) -> Rows:
        groups, _, top_k = expert_GSK.shape
        found = rows.sort_by_expert(
            expert_GSK.reshape(-1, top_k),
            num_experts=num_experts,
            max_rows=None if slots_of_group is None else groups * slots_of_group,
            room=room,
        )
        # The rows of a device are a part of one dim of the global arrays, and so are its counts.
        return found._replace(count_E=found.count_E[None])

    def dispatch(x_GSM: jax.Array, found: Rows) -> jax.Array:
        return rows.dispatch(x_GSM.reshape(-1, x_GSM.shape[-1]), found)

    with jax.named_scope("dispatch"):
        places: Any = Rows(*[split] * 3)  # pyright: ignore[reportArgumentType]
        found = on_devices.on_each_device(layout, sort, (split,), places)(served.expert_GSK)
        xs_RM = on_devices.differentiably(layout, dispatch, (split, places), split)(x_GSM, found)
        xs_RM = lay("rows", xs_RM)
    with jax.named_scope("expert"):
        hidden = functools.partial(lay, "rows_hidden")
        if backend == "loops" and dropout_key_G is None:
            ys_RM = _by_loops(layout, found, weights, xs_RM, config, use, room)
        else:
            product = functools.partial(experts.grouped_matmul, backend=backend, room=room)
            form = _form(layout, found, config, use, product, hidden, dropout_key_G)
            ys_RM = experts.ffn(weights, xs_RM, config, form)
        ys_RM = lay("rows", ys_RM)

    def combine(ys_RM: jax.Array, gate_GSK: jax.Array, found: Rows) -> jax.Array:
        gate_TK = gate_GSK.reshape(found.row_TK.shape)
        return rows.combine(ys_RM, gate_TK, found).reshape(*gate_GSK.shape[:2], -1)

    with jax.named_scope("combine"):
        run = on_devices.differentiably(layout, combine, (split, split, places), split)
        return run(ys_RM, served.gate_GSK, found)


def _form(
    layout: Layout | None,
    found: Rows,
    config: configs.MoEConfig,
    use: Use,
    grouped_matmul: Callable[..., jax.Array],
    hidden: Callable[[jax.Array], jax.Array],
    dropout_key_G: jax.Array | None,
) -> experts.Form:
    """Returns the form of rows [R, ...] for the experts' network."""
    local = functools.partial(on_devices.on_each_device, layout)
    row_axes = on_devices.axes_of(layout, "groups", "G")
    hidden_axes = on_devices.axes_of(layout, "rows_hidden", "H")

    def multiply(role: str, x_RX: jax.Array, *weights_EXX: jax.Array) -> tuple[jax.Array, ...]:
        split_in = hidden_axes if role == "expert_out" else ()
        split_out = hidden_axes if role == "expert_in" else ()
        partial_over = on_devices.free_of(layout, split_in)

        def products(x_RX: jax.Array, weights_EXX: tuple, count_1E: jax.Array) -> tuple:
            # Marked once, so that the gradient is summed once for all of them.
            x_RX = experts.varying_alike(x_RX, *weights_EXX)[0]
            found = [grouped_matmul(x_RX, weight, count_1E[0]) for weight in weights_EXX]
            return tuple(on_devices.summed(y_RX, partial_over) for y_RX in found)

        # Gathered for this use and not kept: see `experts.linear`.
        @jax.checkpoint
        def gathered(x_RX: jax.Array, weights_EXX: tuple, count_DE: jax.Array) -> tuple:
            weights_EXX = tuple(use(role, weight.astype(x_RX.dtype)) for weight in weights_EXX)
            specs = P(row_axes, split_in), P(None, split_in, split_out), P(row_axes)
            run = on_devices.differentiably(layout, products, specs, P(row_axes, split_out))
            return run(x_RX, weights_EXX, count_DE)

        return gathered(x_RX, weights_EXX, found.count_E)

    def bias(role: str, bias_EX: jax.Array) -> jax.Array:
        return _bias_of_rows(layout, found, use(role, bias_EX))

    def drop(h_RH: jax.Array) -> jax.Array:
        """Drops hidden units of each token in each expert."""

        def keys(key_G: jax.Array, found: Rows) -> jax.Array:
            tokens, top_k = found.row_TK.shape
            token_R, of_group = found.choice_R // top_k, tokens // key_G.shape[0]
            expert_R = _expert_of_rows(found.count_E, found.choice_R)
            choice_R = token_R % of_group * config.num_experts + expert_R
            return jax.vmap(jax.random.fold_in)(key_G[token_R // of_group], choice_R)

        places: Any = Rows(*[P(row_axes)] * 3)  # pyright: ignore[reportArgumentType]
        key_R = local(keys, (P(row_axes), places), P(row_axes))(dropout_key_G, found)
        return experts.dropped(h_RH, key_R, config.expert_dropout)

    return experts.Form(multiply, bias, hidden, None if dropout_key_G is None else drop)


def _by_loops(
    layout: Layout | None,
    found: Rows,
    weights: ExpertWeights,
    xs_RM: jax.Array,
    config: configs.MoEConfig,
    use: Use,
    room: int,
) -> jax.Array:
    """Runs the experts' network, expert by expert, whole: see `experts.over_experts`."""
    split_rows = P(on_devices.axes_of(layout, "groups", "G"))
    hidden = on_devices.axes_of(layout, "rows_hidden", "H")
    split_of = {
        "in_EMH": P(None, None, hidden),
        "gate_EMH": P(None, None, hidden),
        "in_bias_EH": P(None, hidden),
        "gate_bias_EH": P(None, hidden),
        "out_EHM": P(None, hidden),
    }
    partial_over = on_devices.free_of(layout, hidden)
    held = {name: w for name in split_of if (w := getattr(weights, name)) is not None}

    def network(own: dict[str, jax.Array], x_TM: jax.Array) -> jax.Array:
        return experts.of_one_expert(ExpertWeights(**own), x_TM, config)

    def run(x_RM: jax.Array, held: dict[str, jax.Array], count_1E: jax.Array) -> jax.Array:
        y_RM = experts.over_experts(network, held, x_RM, count_1E[0], room=room)
        return on_devices.summed(y_RM, partial_over)

    # Gathered for this use and not kept: see `experts.linear`.
    @jax.checkpoint
    def gathered(x_RM: jax.Array, held: dict[str, jax.Array], count_DE: jax.Array) -> jax.Array:
        used = {name: use(experts.ROLES[name], w.astype(x_RM.dtype)) for name, w in held.items()}
        specs = split_rows, {name: split_of[name] for name in held}, split_rows
        return on_devices.differentiably(layout, run, specs, split_rows)(x_RM, used, count_DE)

    ys_RM = gathered(xs_RM, held, found.count_E)
    if weights.out_bias_EM is None:
        return ys_RM
    # Once: of a split hidden dim each device has a part of the sum.
    bias_EM = use("expert_out_bias", weights.out_bias_EM.astype(ys_RM.dtype))
    return ys_RM + _bias_of_rows(layout, found, bias_EM)


def _expert_of_rows(count_1E: jax.Array, choice_R: jax.Array) -> jax.Array:
    """Returns, of one device, each row's expert; of rows that are left over, any."""
    expert_E = jnp.arange(count_1E.shape[1])
    return jnp.repeat(expert_E, count_1E[0], total_repeat_length=choice_R.shape[0])


def _bias_of_rows(layout: Layout | None, found: Rows, bias_EX: jax.Array) -> jax.Array:
    """Returns each row's expert's bias."""
    row_axes = on_devices.axes_of(layout, "groups", "G")
    local = on_devices.on_each_device(
        layout, _expert_of_rows, (P(row_axes), P(row_axes)), P(row_axes)
    )
    expert_R = local(found.count_E, found.choice_R)
    # Rows that are left over may hold anything, and have no gradient.
    return jnp.where(found.choice_R[:, None] >= 0, bias_EX[expert_R], 0)


def collectives(
    layout: Layout, shape_RM: Sequence[int], itemsize: int, *, recomputed: bool
) -> list[Collective]:
    """Returns what one MoE layer's rows send in a training step, beside its weights.

    Args:
      layout: on a mesh.
      shape_RM: of the rows of all devices.
      itemsize: bytes of one element.
      recomputed: the backward runs the forward again, and its sum with it.
    """
    held = traffic.held_bytes(layout, "rows", shape_RM, itemsize)
    hidden = layout.axes_of("rows_hidden", "H")
    sums = traffic.one(layout, "all-reduce", hidden, held, "rows")
    return traffic.times(sums, 2 + recomputed)
