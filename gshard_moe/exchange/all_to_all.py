"""Exchange by hand: one `shard_map`, chunks of an all-to-all over a leading device axis (GShard).

What XLA's partitioner makes of `spmd`'s annotations is written out here, so that nothing else can
be made of them: a device cuts its slots by the device that has the experts, sends each its part,
runs its own experts on what it gets, and sends it back. Chunks are unrolled; nothing orders them
but their data: the compiler lets one travel while another is computed. With a hidden dim split over
another axis (tensor parallelism) each of its devices sends a part of the model width, gathers the
rest where it arrives, and its partial sums are scattered back before they return.

Weights are gathered inside, once, so that their gradients are summed over the chunks before they
are scattered, once.

D devices of the expert axes; e experts, g groups, m model width of a device.
Source: GShard, arXiv 2006.16668, section 3.2; MindSpeed's pipe-experts.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from gshard_moe import config as configs
from gshard_moe import experts
from gshard_moe import layout as layouts
from gshard_moe.exchange import chunks as chunking
from gshard_moe.experts import ROLES, ExpertWeights
from gshard_moe.layout import Layout

_GATHERED = "gathered expert weights"


def carry(
    xs_EGCM: jax.Array, weights: ExpertWeights, *, config: configs.MoEConfig, layout: Layout
) -> jax.Array:
    """Takes slots to their experts and back.

    Args:
      xs_EGCM: slots where their tokens are.
      weights: of all experts, as stored.
      config: of the experts.
      layout: on a mesh.
    """
    mesh = jax.sharding.get_abstract_mesh()
    mesh = layout.mesh() if mesh.empty else mesh
    held = {name: w for name, w in weights._asdict().items() if w is not None}
    slots = P(*layout.spec("slots_source")[:-1], layout.axes_of("slots_wire", "M") or None)
    specs = {name: layout.spec(ROLES[name]) for name in held}
    run = functools.partial(_on_a_device, here=_Here.of(layout), config=config)
    # Gathered weights are not kept for the backward, which gathers them again.
    policy = jax.checkpoint_policies.save_anything_except_these_names(_GATHERED)
    return jax.shard_map(
        jax.checkpoint(run, policy=policy),
        mesh=mesh,
        in_specs=(slots, specs),
        out_specs=slots,
        axis_names=set(layouts.free_axes(mesh)),
    )(xs_EGCM, held)


@dataclasses.dataclass(frozen=True)
class _Here:
    """The mesh axes that a layout splits things over; those to gather, by weight and dim."""

    experts: tuple[str, ...]
    width: tuple[str, ...]
    hidden: tuple[str, ...]
    gather: dict[str, tuple[tuple[int, tuple[str, ...]], ...]]
    chunks: int

    @classmethod
    def of(cls, layout: Layout) -> "_Here":
        gather = {}
        for name, role in ROLES.items():
            stored, used = layout.dims(role), layout.dims(role, "used")
            pairs = enumerate(zip(stored, used, strict=True))
            gone = [(i, tuple(a for a in s.axes if a not in u.axes)) for i, (s, u) in pairs]
            gather[name] = tuple((i, axes) for i, axes in gone if axes)
        return cls(
            layout.axes_of("slots_wire", "E"),
            layout.axes_of("slots_wire", "M"),
            layout.axes_of("slots_hidden", "H"),
            gather,
            layout.config.exchange.chunks,
        )


def _on_a_device(
    xs_EgCm: jax.Array, held: dict[str, jax.Array], *, here: _Here, config: configs.MoEConfig
) -> jax.Array:
    parts = jax.lax.axis_size(here.experts) if here.experts else 1
    xs = xs_EgCm.reshape(parts, -1, *xs_EgCm.shape[1:])  # D e g C m
    where = chunking.cut(here.chunks, num_experts=xs.shape[1], capacity=xs.shape[3], parts=1)
    used = {name: _gathered(w, here.gather[name], xs.dtype) for name, w in held.items()}
    dim = 1 if where.parts else 3
    out = []
    at = 0
    for piece, size in zip(jax.lax.split(xs, where.sizes, axis=dim), where.sizes, strict=True):
        own = used
        if where.parts:
            own = {n: jax.lax.slice_in_dim(w, at, at + size, axis=0) for n, w in used.items()}
        at += size
        out.append(_chunk(piece, own, here, config))
    ys = jnp.concatenate(out, axis=dim) if len(out) > 1 else out[0]
    return ys.reshape(-1, *ys.shape[2:])


def _gathered(
    weight: jax.Array, dims: Sequence[tuple[int, tuple[str, ...]]], dtype: jnp.dtype
) -> jax.Array:
    weight = weight.astype(dtype)
    for dim, axes in dims:
        weight = jax.lax.all_gather(weight, axes, axis=dim, tiled=True)
    # In float32, so that the chunks' gradients of a weight are summed in float32.
    return checkpoint_name(weight.astype(jnp.float32), _GATHERED)


def _chunk(
    xs: jax.Array, used: dict[str, jax.Array], here: _Here, config: configs.MoEConfig
) -> jax.Array:
    """Takes one chunk [D, e, g, c, m] there and back."""

    def swap(x: jax.Array) -> jax.Array:
        if not here.experts:
            return x
        with jax.named_scope("exchange"):
            return jax.lax.all_to_all(x, here.experts, split_axis=0, concat_axis=0)

    xs = swap(xs)
    if here.width:
        with jax.named_scope("exchange"):
            xs = jax.lax.all_gather(xs, here.width, axis=4, tiled=True)

    def multiply(role: str, x: jax.Array, *weights: jax.Array) -> list[jax.Array]:
        weights = tuple(weight.astype(x.dtype) for weight in weights)
        found = [jnp.einsum("degcx,exy->degcy", x, weight) for weight in weights]
        if role == "expert_in" or not here.hidden:
            return found
        if not here.width:
            return [jax.lax.psum(y, here.hidden) for y in found]
        return [jax.lax.psum_scatter(y, here.width, scatter_dimension=4, tiled=True) for y in found]

    def bias(role: str, bias_eX: jax.Array) -> jax.Array:
        if role == "expert_out_bias" and here.width:  # the part of what is scattered
            size = bias_eX.shape[1] // jax.lax.axis_size(here.width)
            at = jax.lax.axis_index(here.width) * size
            bias_eX = jax.lax.dynamic_slice_in_dim(bias_eX, at, size, axis=1)
        return bias_eX[None, :, None, None, :]

    with jax.named_scope("expert"):
        form = experts.Form(multiply, bias, lambda h: h)
        ys = experts.ffn(ExpertWeights(**used), xs, config, form)
    return swap(ys)
