"""What a member of the exchange needs to run by device: the axes, and `shard_map` or none.

A layout of None is one device; inside a caller's `shard_map`, its axes are already done.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from gshard_moe import experts
from gshard_moe import layout as layouts
from gshard_moe.layout import Layout


def differentiably(
    layout: Layout | None, f: Callable, in_specs: Sequence[Any], out_spec: P
) -> Callable[..., Any]:
    """Runs `f(*arrays, fixed)` on each device's parts; differentiable in all but the last argument.

    JAX 0.12 cannot take the gradient of one `shard_map` inside another, so there the gradient is a
    `shard_map` of its own, which computes `f` again; what of it is not used, XLA removes.
    """
    local = functools.partial(on_each_device, layout)
    mesh = None if layout is None else layouts.mesh_here(layout)
    if mesh is None or layouts.free_axes(mesh) == mesh.axis_names:
        return local(f, tuple(in_specs), out_spec)

    @jax.custom_vjp
    def run(arrays: tuple, fixed: Any) -> Any:
        return local(f, tuple(in_specs), out_spec)(*arrays, fixed)

    def forward(arrays: tuple, fixed: Any) -> tuple:
        return run(arrays, fixed), (arrays, fixed)

    def backward(saved: tuple, dy: Any) -> tuple:
        def gradients(arrays: tuple, fixed: Any, dy: Any) -> tuple:
            return jax.vjp(lambda *arrays: f(*arrays, fixed), *arrays)[1](dy)

        *specs, fixed_spec = in_specs
        of_arrays = tuple(specs)
        return local(gradients, (of_arrays, fixed_spec, out_spec), of_arrays)(*saved, dy), None

    run.defvjp(forward, backward)

    def marked(*args: Any) -> Any:
        leaves, tree = jax.tree.flatten(args[:-1])
        return run(tree.unflatten(experts.varying_alike(*leaves)), args[-1])

    return marked


def on_each_device(layout: Layout | None, f: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """Runs `f` on each device's parts; inside `shard_map`, on those that are there already."""
    if layout is None:
        return f
    mesh = layouts.mesh_here(layout)
    free = functools.partial(layouts.free_spec, mesh)
    specs = jax.tree.map(free, (in_specs, out_specs), is_leaf=lambda x: isinstance(x, P))
    if all(spec == P(*[None] * len(spec)) for spec in jax.tree.leaves(specs)):
        return f
    axes = set(layouts.free_axes(mesh))
    return jax.shard_map(f, mesh=mesh, in_specs=specs[0], out_specs=specs[1], axis_names=axes)


def axes_of(layout: Layout | None, role: str, letter: str) -> tuple[str, ...]:
    """Returns the mesh axes that a dim of a role is split over."""
    return () if layout is None else layout.axes_of(role, letter)


def free_of(layout: Layout | None, axes: Sequence[str]) -> list[str]:
    """Returns those of the axes over which the arrays here are still global."""
    free = () if layout is None else layouts.free_axes(layouts.mesh_here(layout))
    return [axis for axis in axes if axis in free]


def parts_and_place(axes: Sequence[str]) -> tuple[int, jax.Array | int]:
    """Returns, inside `shard_map`, into how many parts `axes` split a dim, and which is here."""
    if not axes:
        return 1, 0
    return jax.lax.axis_size(axes), jax.lax.axis_index(axes)


def summed(y_RX: jax.Array, axes: Sequence[str]) -> jax.Array:
    """Adds up, inside `shard_map`, the parts of a product over a dim that is split over `axes`."""
    return jax.lax.psum(y_RX, axes) if axes else y_RX
