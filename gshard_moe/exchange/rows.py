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
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Key

from gshard_moe import config as configs
from gshard_moe import experts
from gshard_moe import layout as layouts
from gshard_moe.dispatch import Rows, Served, rows
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
      layout: where; `Layout.check_ragged` finds nothing. None: all of it on one device.
      use: lays out a weight for its use.
      slots_of_group: choices of a group that can be served at most; None: all.
      dropout_key_G: a key for each group, where hidden units are dropped.
    Returns:
      The weighted sum of each token's served experts.
    """
    # Groups and rows are split alike; of the groups of a device, the rows are one list.
    split = P(_axes(layout, "groups", "G"))
    num_experts = config.num_experts
    asked = "auto" if layout is None else layout.config.compute.grouped_matmul
    backend = experts.choose_backend(asked, _platform(layout))
    room = experts.ROOM if backend == "loops" else 0

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
        found = _on_each_device(layout, sort, (split,), places)(served.expert_GSK)
        xs_RM = _differentiably(layout, dispatch, (split, places), split)(x_GSM, found)
        xs_RM = lay("rows", xs_RM)
    with jax.named_scope("expert"):
        hidden = functools.partial(lay, "rows_hidden")
        product = functools.partial(experts.grouped_matmul, backend=backend, room=room)
        form = _form(layout, found, config, use, product, hidden, dropout_key_G)
        ys_RM = lay("rows", experts.ffn(weights, xs_RM, config, form))

    def combine(ys_RM: jax.Array, gate_GSK: jax.Array, found: Rows) -> jax.Array:
        gate_TK = gate_GSK.reshape(found.row_TK.shape)
        return rows.combine(ys_RM, gate_TK, found).reshape(*gate_GSK.shape[:2], -1)

    with jax.named_scope("combine"):
        run = _differentiably(layout, combine, (split, split, places), split)
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
    local = functools.partial(_on_each_device, layout)
    row_axes = _axes(layout, "groups", "G")
    hidden_axes = _axes(layout, "rows_hidden", "H")

    def multiply(role: str, x_RX: jax.Array, weight_EXX: jax.Array) -> jax.Array:
        split_in = hidden_axes if role == "expert_out" else ()
        split_out = hidden_axes if role == "expert_in" else ()
        partial_over = [axis for axis in split_in if axis in _free_axes(layout)]

        def product(x_RX: jax.Array, weight_EXX: jax.Array, count_1E: jax.Array) -> jax.Array:
            y_RX = grouped_matmul(x_RX, weight_EXX, count_1E[0])
            return jax.lax.psum(y_RX, partial_over) if partial_over else y_RX

        # Gathered for this use and not kept: see `experts.linear`.
        @jax.checkpoint
        def gathered(x_RX: jax.Array, weight_EXX: jax.Array, count_DE: jax.Array) -> jax.Array:
            weight_EXX = use(role, weight_EXX.astype(x_RX.dtype))
            specs = P(row_axes, split_in), P(None, split_in, split_out), P(row_axes)
            run = _differentiably(layout, product, specs, P(row_axes, split_out))
            return run(x_RX, weight_EXX, count_DE)

        return gathered(x_RX, weight_EXX, found.count_E)

    def expert_of_rows(count_1E: jax.Array, choice_R: jax.Array) -> jax.Array:
        expert_E = jnp.arange(config.num_experts)
        return jnp.repeat(expert_E, count_1E[0], total_repeat_length=choice_R.shape[0])

    def bias(role: str, bias_EX: jax.Array) -> jax.Array:
        specs = P(row_axes), P(row_axes)
        expert_R = local(expert_of_rows, specs, P(row_axes))(found.count_E, found.choice_R)
        # Rows that are left over may hold anything, and have no gradient.
        return jnp.where(found.choice_R[:, None] >= 0, use(role, bias_EX)[expert_R], 0)

    def drop(h_RH: jax.Array) -> jax.Array:
        """Zeroes hidden units at random, by the row's choice, and scales up the rest."""
        keep = functools.partial(
            jax.random.bernoulli, p=1 - config.expert_dropout, shape=h_RH.shape[1:]
        )

        def keep_local(key_G: jax.Array, choice_R: jax.Array, row_TK: jax.Array) -> jax.Array:
            of_group = row_TK.size // key_G.shape[0]
            keys = jax.vmap(jax.random.fold_in)(key_G[choice_R // of_group], choice_R % of_group)
            return jax.vmap(keep)(keys)

        specs = P(row_axes), P(row_axes), P(row_axes)
        args = dropout_key_G, found.choice_R, found.row_TK
        keep_RH = local(keep_local, specs, P(row_axes))(*args)
        return jnp.where(keep_RH, h_RH / (1 - config.expert_dropout), jnp.zeros((), h_RH.dtype))

    return experts.Form(multiply, bias, hidden, None if dropout_key_G is None else drop)


def collectives(
    layout: Layout, shape_RM: Sequence[int], itemsize: int, *, num_inputs: int, recomputed: bool
) -> list[Collective]:
    """Returns what one MoE layer's rows send in a training step, beside its weights.

    Args:
      layout: on a mesh.
      shape_RM: of the rows of all devices.
      itemsize: bytes of one element.
      num_inputs: input matrices of an expert; each has its own gradient of the rows.
      recomputed: the backward runs the forward again, and its sum with it.
    """
    held = traffic.held_bytes(layout, "rows", shape_RM, itemsize)
    hidden = layout.axes_of("rows_hidden", "H")
    sums = traffic.one(layout, "all-reduce", hidden, held, "rows")
    return traffic.times(sums, 1 + recomputed + num_inputs)


def _differentiably(
    layout: Layout | None, f: Callable[..., jax.Array], in_specs: Sequence[Any], out_spec: P
) -> Callable[..., jax.Array]:
    """Runs `f(*arrays, fixed)` on each device's parts; differentiable in all but the last argument.

    JAX 0.12 cannot take the gradient of one `shard_map` inside another, so the gradient is a
    `shard_map` of its own here, which computes `f` again; what of it is not used, XLA removes.
    """
    local = functools.partial(_on_each_device, layout)

    @jax.custom_vjp
    def run(arrays: tuple, fixed: Any) -> jax.Array:
        return local(f, tuple(in_specs), out_spec)(*arrays, fixed)

    def forward(arrays: tuple, fixed: Any) -> tuple:
        return run(arrays, fixed), (arrays, fixed)

    def backward(saved: tuple, dy: jax.Array) -> tuple:
        def gradients(arrays: tuple, fixed: Any, dy: jax.Array) -> tuple:
            return jax.vjp(lambda *arrays: f(*arrays, fixed), *arrays)[1](dy)

        *specs, fixed_spec = in_specs
        of_arrays = tuple(specs)
        return local(gradients, (of_arrays, fixed_spec, out_spec), of_arrays)(*saved, dy), None

    run.defvjp(forward, backward)
    return lambda *args: run(tuple(experts.varying_alike(*args[:-1])), args[-1])


def _on_each_device(layout: Layout | None, f: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """Runs `f` on each device's parts; inside `shard_map`, on those that are there already."""
    if layout is None:
        return f
    mesh = _mesh(layout)
    free = functools.partial(layouts.free_spec, mesh)
    specs = jax.tree.map(free, (in_specs, out_specs), is_leaf=lambda x: isinstance(x, P))
    if all(spec == P(*[None] * len(spec)) for spec in jax.tree.leaves(specs)):
        return f
    axes = set(layouts.free_axes(mesh))
    return jax.shard_map(f, mesh=mesh, in_specs=specs[0], out_specs=specs[1], axis_names=axes)


def _axes(layout: Layout | None, role: str, letter: str) -> tuple[str, ...]:
    return () if layout is None else layout.axes_of(role, letter)


def _free_axes(layout: Layout | None) -> tuple[str, ...]:
    """Returns the axes over which the arrays here are still global."""
    return () if layout is None else layouts.free_axes(_mesh(layout))


def _mesh(layout: Layout) -> Mesh | AbstractMesh:
    """Returns the mesh that is set, else the layout's."""
    mesh = jax.sharding.get_abstract_mesh()
    return layout.mesh() if mesh.empty else mesh


def _platform(layout: Layout | None) -> str:
    """Returns what the layout's devices are, or the default's if they are not known."""
    mesh = None if layout is None else layout.mesh()
    return mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else jax.default_backend()
