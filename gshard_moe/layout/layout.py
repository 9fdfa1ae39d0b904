"""`Layout`: a sharding card on a mesh; where every tensor lives, and how to say so to XLA.

A layout knows names and shapes, never tensor values. It works on real devices and on an
`AbstractMesh`, where nothing can run but every shape and byte is known.
"""

import contextlib
import dataclasses
import functools
import math
import os
import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from gshard_moe import cards, config
from gshard_moe.layout import by_hand, flash, levels, notation, ragged, sizes

# A parameter is `stored` between steps, `used` in the computation (the axes of `layout.gather`
# dropped), and its master copy and moments are in the `optimizer`'s layout.
Stage = Literal["stored", "used", "optimizer"]
MeshLike = Mesh | AbstractMesh | Mapping[str, int] | str | None


class LayoutError(ValueError):
    """Reports every fault of a layout at once, a line each, with the card and the key."""


class Layout:
    """Where every tensor of a model lives.

    Equal cards on equal meshes make equal, hashable layouts, so a layout may be a static argument.

    Attributes:
      config: the sharding card.
      source: the card's name in messages.
      bound_mesh: the mesh that it was given, or None: all devices, when first needed.
    """

    def __init__(
        self,
        sharding: config.ShardingConfig,
        *,
        source: str = "sharding",
        mesh: MeshLike = None,
    ):
        """Checks the card's notation and binds it to a mesh.

        Args:
          sharding: the card.
          source: the card's name in messages.
          mesh: a `Mesh` or an `AbstractMesh` of the caller's, with the card's axes; or other sizes
            for some axes of the card's mesh, as a dict or as text, `"fsdp=4,expert=2"`.
        Raises:
          LayoutError: with every fault.
        """
        self.source = source
        self.bound_mesh = None
        if isinstance(mesh, str):
            mesh = parse_mesh(mesh)
        if isinstance(mesh, (Mesh, AbstractMesh)):
            _refuse_foreign(mesh, sharding.mesh.axes, source)
            self.bound_mesh = mesh
        elif mesh is not None:
            with _as_layout_error(source):
                resized = sharding.mesh.override(mesh)
            sharding = dataclasses.replace(sharding, mesh=resized)
        self.config = sharding
        self._dims, faults = notation.read(sharding.layout, self.axes)
        if faults:
            raise LayoutError("\n".join(f"{source}: {fault}" for fault in faults))

    @classmethod
    def load(cls, name_or_path: str | os.PathLike[str], *, mesh: MeshLike = None) -> "Layout":
        """Reads a sharding card by name or path; `mesh` as in `Layout`.

        Raises:
          CardError, LayoutError: with every fault of the card.
        """
        source = cards.source_of("shardings", name_or_path)
        try:
            sharding = cards.load_sharding(name_or_path)
        except cards.CardError as error:
            more = [f"{source}: {fault}" for fault in notation.faults_of_partial(error.partial)]
            raise cards.CardError("\n".join([str(error), *more])) from None
        return cls(sharding, source=source, mesh=mesh)

    def on(self, mesh: Mesh | AbstractMesh | int) -> "Layout":
        """Returns this layout on a mesh, or on an abstract one of that many devices.

        Raises:
          LayoutError: if the mesh has other axes, or the card's sizes do not fill the devices.
        """
        if isinstance(mesh, int):
            with _as_layout_error(self.source):
                sizes = self.config.mesh.resolve(mesh)
            mesh = AbstractMesh(sizes, self.axes, axis_types=(AxisType.Auto,) * len(sizes))
        return Layout(self.config, source=self.source, mesh=mesh)

    @property
    def axes(self) -> tuple[str, ...]:
        """The names of the mesh axes, outermost first."""
        return self.config.mesh.axes

    def mesh(
        self,
        devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
    ) -> Mesh | AbstractMesh:
        """Returns the mesh: the bound one, or the card's over `devices` (default: all).

        With `devices`, a bound layout gives a mesh of its own axis sizes over them.

        Raises:
          LayoutError: if the mesh needs more devices than there are, or leaves some unused.
        """
        if devices is None and self.bound_mesh is not None:
            return self.bound_mesh
        devices = tuple(jax.devices() if devices is None else devices)
        card = self.config.mesh
        if self.bound_mesh is not None:
            sizes = tuple(self.bound_mesh.shape[axis] for axis in self.axes)
            card = dataclasses.replace(card, shape=sizes)
        with _as_layout_error(self.source):
            sizes = card.resolve(len(devices))
        return _auto_mesh(sizes, self.axes, devices)

    @property
    def axis_sizes(self) -> dict[str, int]:
        """The size of every mesh axis."""
        return dict(self.mesh().shape)

    def axes_of(self, role: str, letter: str, stage: Stage = "stored") -> tuple[str, ...]:
        """Returns the mesh axes that a dim of a role is split over.

        Raises:
          LayoutError: if the role is unknown or has no such dim.
        """
        dims = self.dims(role, stage)
        for dim in dims:
            if dim.letter == letter:
                return dim.axes
        letters = " ".join(dim.letter for dim in dims)
        raise LayoutError(
            f"{self.source}: layout.{role}: a dim must be one of {letters}; got {letter!r}"
        )

    def dims(self, role: str, stage: Stage = "stored") -> tuple[notation.Dim, ...]:
        """Returns a role's dimensions, each with its mesh axes.

        Raises:
          LayoutError: if the role is unknown.
        """
        stages = typing.get_args(Stage)
        if stage not in stages:
            raise ValueError(f"stage must be one of {', '.join(stages)}; got stage={stage!r}")
        if role not in self._dims.stored:
            known = ", ".join(self._dims.stored)
            raise LayoutError(
                f"{self.source}: layout: a role must be known; got {role!r}; the roles are {known}"
            )
        dims = self._dims.stored[role]
        if stage == "optimizer":
            return self._dims.optimizer.get(role, dims)
        if stage == "used" and role in notation.PARAMETERS:
            gather = self.config.layout.gather
            return tuple(
                notation.Dim(dim.letter, tuple(axis for axis in dim.axes if axis not in gather))
                for dim in dims
            )
        return dims

    def gathered(
        self, role: str, axes: Iterable[str] | None = None
    ) -> tuple[tuple[int, tuple[str, ...]], ...]:
        """Returns what a parameter loses where it is used: dims, by number, with their axes.

        Args:
          role: of the parameter.
          axes: of these alone; default: all.
        """
        of = set(self.axes if axes is None else axes)
        pairs = zip(self.dims(role), self.dims(role, "used"), strict=True)
        gone = [
            [a for a in stored.axes if a not in used.axes and a in of] for stored, used in pairs
        ]
        return tuple((dim, tuple(axes)) for dim, axes in enumerate(gone) if axes)

    def spec(self, role: str, stage: Stage = "stored", *, ndim: int | None = None) -> P:
        """Returns a role's `PartitionSpec`.

        Args:
          role: of `notation.ROLES`, or one of the card's own `[layout.user]`.
          stage: of a parameter: as stored, as used, or of its optimiser moments.
          ndim: of the tensor, where layers are stacked on one leading dim (never split).
        Raises:
          LayoutError: if the role is unknown or `ndim` is not the role's, or one more.
        """
        dims = self.dims(role, stage)
        extra = 0 if ndim is None else ndim - len(dims)
        if extra not in (0, 1):
            letters = " ".join(dim.letter for dim in dims)
            raise LayoutError(
                f"{self.source}: layout.{role}: a tensor must have the dims {letters} "
                f"(or one more, for stacked layers); got ndim={ndim}"
            )
        entries = [
            None if not dim.axes else dim.axes[0] if len(dim.axes) == 1 else dim.axes
            for dim in dims
        ]
        return P(*[None] * extra, *entries)

    def sharding(
        self, role: str, stage: Stage = "stored", *, ndim: int | None = None
    ) -> NamedSharding:
        """Returns a role's `NamedSharding` on the mesh; arguments as in `spec`."""
        return NamedSharding(self.mesh(), self.spec(role, stage, ndim=ndim))

    def constrain[X: jax.Array](self, role: str, x: X, stage: Stage = "stored") -> X:
        """Asks XLA to lay `x` out as its role says; the value does not change.

        Inside `shard_map` the manual axes are dropped. In an Explicit mesh it reshards.

        Raises:
          LayoutError: if a dim does not divide by its axes, or the mesh that is set lacks the
            card's axes, has others, mixes axis types, or is not of the sizes that this is bound to.
        """
        spec = self.spec(role, stage, ndim=x.ndim)
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            mesh = self.mesh()
            if isinstance(mesh, AbstractMesh) and not isinstance(x, Tracer):
                raise LayoutError(
                    f"{self.source}: mesh: values need devices; got an abstract mesh of "
                    f"{mesh.size}; trace this (jax.eval_shape, .lower), or use layout.on(a mesh)"
                )
        else:
            _refuse_foreign(mesh, self.axes, self.source)
            self._refuse_other_sizes(mesh)
        spec = free_spec(mesh, spec)
        self._require_divisible(role, x.shape, spec, dict(mesh.shape))
        kind = axis_type(mesh)
        if kind is AxisType.Manual:
            return x
        if kind is AxisType.Explicit:
            return jax.sharding.reshard(x, NamedSharding(mesh, spec))
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    def use[X: jax.Array](self, role: str, x: X) -> X:
        """Returns a parameter as the computation uses it; its gradient comes back as stored.

        The axes of `layout.gather` are gathered on the way in, and summed and scattered on the way
        back, so that a gradient is never whole where its parameter is not.
        """
        return _used(self, role, x)

    def shape_per_device(
        self, role: str, shape: Sequence[int], stage: Stage = "stored"
    ) -> tuple[int, ...]:
        """Returns the shape that one device holds of a tensor of this global shape.

        Raises:
          LayoutError: if a dim does not divide by its axes.
        """
        spec = self.spec(role, stage, ndim=len(shape))
        self._require_divisible(role, shape, spec, self.axis_sizes)
        return NamedSharding(self.mesh(), spec).shard_shape(tuple(shape))

    def require_divisible(self, role: str, shape: Sequence[int]) -> None:
        """Refuses a shape, as it is here, that its axes do not divide.

        Here: on the mesh that is set, and without the axes that a caller's `shard_map` has taken.

        Raises:
          LayoutError: if a dim does not divide by its axes.
        """
        mesh = jax.sharding.get_abstract_mesh()
        mesh = self.mesh() if mesh.empty else mesh
        spec = free_spec(mesh, self.spec(role, ndim=len(shape)))
        self._require_divisible(role, shape, spec, dict(mesh.shape))

    def bytes_per_device(
        self, role: str, shape: Sequence[int], dtype: DTypeLike, stage: Stage = "stored"
    ) -> int:
        """Returns the bytes that one device holds of a tensor of this global shape."""
        return math.prod(self.shape_per_device(role, shape, stage)) * jnp.dtype(dtype).itemsize

    def check(
        self,
        model: config.ModelConfig,
        batch_size: int | None = None,
        seq_len: int | None = None,
        *,
        source: str = "model",
    ) -> None:
        """Refuses a model that this layout cannot hold.

        The roles of parameters that the model lacks are left out.

        Args:
          model: the model card.
          batch_size: sequences in one forward pass; default: the model card's.
          seq_len: tokens in a sequence; default: the model card's.
          source: the model card's name in messages.
        Raises:
          LayoutError: with every dim that its mesh axes do not divide, and if the tokens do not
            divide by the group size or are too many for the model's positions, or slots for the
            chunks too few; and why the exchange, or attention's kernel, is impossible, if the card
            asks for it.
        """
        size_of = sizes.letter_sizes(model, batch_size, seq_len)
        mesh = self.axis_sizes
        faults = sizes.misfits(model, size_of, source)
        if self.config.compute.attention == "flash":
            found = self.flash_faults(size_of, mesh)
            faults += [f'{fault}; or use attention = "auto"' for fault in found]
        ours = sizes.parameters_of(model)
        if model.moe is not None:
            faults += self._exchange_faults(ours)
            faults += self._chunk_faults(size_of["E"], size_of["C"])
        laid_out: list[tuple[str, Stage, str]] = []
        for role in (*ours, *notation.ACTIVATIONS):
            laid_out.append((f"layout.{role}", "stored", role))
        for role in ours:
            if role in self._dims.optimizer:
                laid_out.append((f"layout.optimizer.{role}", "optimizer", role))
        alike: dict[str, list[str]] = {}  # one mistake is said once, with all its tensors
        for key, stage, role in laid_out:
            for dim in self.dims(role, stage):
                if dim.letter in size_of:
                    for fault in _divides(dim, size_of[dim.letter], mesh, source):
                        alike.setdefault(fault, []).append(key)
        for fault, (first, *others) in alike.items():
            also = [key.removeprefix("layout.") for key in others]
            faults.append(f"{first}: {fault}" + (f"; so too {', '.join(also)}" if also else ""))
        if faults:
            raise LayoutError("\n".join(f"{self.source}: {fault}" for fault in faults))

    def check_exchange(self, weights: Iterable[str]) -> None:
        """Refuses an exchange where a device would lack what its tokens or rows need.

        Args:
          weights: the roles of the expert weights that there are.
        Raises:
          LayoutError: with every reason.
        """
        if faults := self._exchange_faults(weights):
            raise LayoutError("\n".join(f"{self.source}: {fault}" for fault in faults))

    def flash_faults(self, size_of: Mapping[str, int], mesh: Mapping[str, int]) -> list[str]:
        """Returns why attention's kernel cannot run, on a mesh of these sizes (`flash.faults`)."""

        def axes_of(role: str, letter: str) -> tuple[str, ...]:
            return tuple(axis for axis in self.axes_of(role, letter) if mesh[axis] > 1)

        return flash.faults(axes_of, [axis for axis in mesh if mesh[axis] > 1], size_of)

    def _exchange_faults(self, weights: Iterable[str]) -> list[str]:
        mesh, exchange = self.axis_sizes, self.config.exchange

        def axes_of(role: str, letter: str, stage: Stage = "used") -> tuple[str, ...]:
            return tuple(axis for axis in self.axes_of(role, letter, stage) if mesh[axis] > 1)

        found = levels.faults(self.config, self.axes_of("slots_wire", "E"), mesh)
        ours = [role for role in weights if role.startswith("expert_")]
        if exchange.tokens == "ragged":
            return found + ragged.exchange_faults(axes_of, ours)
        if self.config.compute.dispatch == "ragged":
            return found + ragged.faults(axes_of, ours)
        if exchange.tokens == "all_to_all":
            return found + by_hand.faults(axes_of, ours, exchange, mesh)
        return found

    def _chunk_faults(self, num_experts: int, capacity: int) -> list[str]:
        """Says if slots are to be cut into more chunks than there are."""
        exchange, mesh = self.config.exchange, self.axis_sizes
        parts = math.prod(mesh[axis] for axis in self.axes_of("slots_wire", "E"))
        local = num_experts // parts
        # With `auto` any fetch may be chosen, and a device may have its own experts alone.
        fetch = exchange.fetch_of(parts)
        if exchange.tokens == "all_to_all" and fetch != "auto":
            local *= by_hand.gathering(exchange, fetch, mesh, parts)
        fault = sizes.chunk_fault(exchange.chunks, local, capacity, exchange.chunk_by)
        return [fault] if fault else []

    def _refuse_other_sizes(self, mesh: Mesh | AbstractMesh) -> None:
        """Refuses a mesh that is set and is not the one that this layout is bound to."""
        bound = self.bound_mesh
        if bound is None or all(mesh.shape[axis] == bound.shape[axis] for axis in self.axes):
            return
        ours, theirs = (
            ", ".join(f"{axis}={m.shape[axis]}" for axis in self.axes) for m in (bound, mesh)
        )
        raise LayoutError(
            f"{self.source}: mesh: the mesh that is set must have the sizes of the one that the "
            f"layout is bound to; got {theirs}, bound to {ours}; use layout.on(mesh)"
        )

    def _require_divisible(
        self, role: str, shape: Sequence[int], spec: P, mesh: Mapping[str, int]
    ) -> None:
        dims = self.dims(role)
        offset = len(shape) - len(dims)
        faults = []
        for index, dim in enumerate(dims):
            entry = spec[offset + index]
            axes = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
            named = notation.Dim(dim.letter, axes)
            for fault in _divides(named, shape[offset + index], mesh, ""):
                faults.append(f"layout.{role}: {fault}")
        if faults:
            raise LayoutError("\n".join(f"{self.source}: {fault}" for fault in faults))

    def __eq__(self, other: object) -> bool:
        """Compares cards and meshes; what the card is called does not matter."""
        if not isinstance(other, Layout):
            return NotImplemented
        return self.config == other.config and self.bound_mesh == other.bound_mesh

    def __hash__(self) -> int:
        """Hashes the mesh, which tells layouts apart well enough."""
        return hash((self.config.mesh, self.bound_mesh))

    def __repr__(self) -> str:
        """Names the card and the mesh."""
        return f"Layout({self.source}, mesh={self.bound_mesh or self.config.mesh})"


def parse_mesh(text: str) -> dict[str, int]:
    """Reads axis sizes, `"fsdp=4,expert=2"`.

    Raises:
      LayoutError: if the text is not of that form, or names an axis twice.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        found = re.fullmatch(r"\s*([A-Za-z]\w*)\s*=\s*(-?[0-9]{1,10})\s*", part, re.ASCII)
        if not found:
            raise LayoutError(f"mesh: must be like fsdp=4,expert=2; got {part!r} in {text!r}")
        axis, size = found.groups()
        if axis in sizes:
            raise LayoutError(f"mesh: an axis must be given once; got {axis!r} in {text!r}")
        sizes[axis] = int(size)
    return sizes


def free_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """Returns the axes of a mesh that are not manual (that no `shard_map` has taken)."""
    pairs = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(axis for axis, kind in pairs if kind is not AxisType.Manual)


def free_spec(mesh: Mesh | AbstractMesh, spec: P) -> P:
    """Drops a mesh's manual axes from a spec."""
    free, entries = free_axes(mesh), []
    for entry in spec:
        named = () if entry is None else (entry,) if isinstance(entry, str) else entry
        left = tuple(axis for axis in named if axis in free)
        entries.append(None if not left else left[0] if len(left) == 1 else left)
    return P(*entries)


def axis_type(mesh: Mesh | AbstractMesh) -> AxisType:
    """Returns the one type of a mesh's free axes.

    Raises:
      LayoutError: if they are of mixed types.
    """
    pairs = zip(mesh.axis_names, mesh.axis_types, strict=True)
    kinds = {axis: kind for axis, kind in pairs if kind is not AxisType.Manual}
    if len(set(kinds.values())) > 1:
        shown = ", ".join(f"{axis}={kind.name}" for axis, kind in kinds.items())
        raise LayoutError(
            f"mesh: the axes must be all Auto or all Explicit; got {shown}; use jax.make_mesh("
            f"shape, names, axis_types=(jax.sharding.AxisType.Auto,) * {len(mesh.axis_names)})"
        )
    return next(iter(kinds.values()), AxisType.Manual)


@functools.lru_cache(maxsize=64)
def _auto_mesh(
    sizes: tuple[int, ...],
    axes: tuple[str, ...],
    devices: tuple[jax.Device, ...],  # pyright: ignore[reportInvalidTypeForm]
) -> Mesh:
    """Makes an all-Auto mesh; JAX chooses the order of devices that suits the links.

    `jax.make_mesh` would refuse an axis of 4 on a torus of 8 x 8 x 8. Where there is no order to
    choose (two devices a chip, part of a slice), the devices are taken as they come.
    """
    try:
        ordered = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    except (NotImplementedError, ValueError, AssertionError):
        ordered = np.array(devices).reshape(sizes)
    return Mesh(ordered, axes, axis_types=(AxisType.Auto,) * len(axes))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _used(layout: Layout, role: str, x: jax.Array) -> jax.Array:
    return layout.constrain(role, x, "used")


def _used_forward(layout: Layout, role: str, x: jax.Array) -> tuple[jax.Array, None]:
    return _used(layout, role, x), None


def _used_backward(layout: Layout, role: str, _: None, dx: jax.Array) -> tuple[jax.Array]:
    # Where it is summed over the gathered axes alone, or is of a table, it is first as it was used,
    # or the partitioner carries the stored split into the computation of dx. Where a product is
    # summed over others too, that would be one sum over all axes of what is whole, cut only then.
    summed = layout.axes_of(*(("slots", "G") if role.startswith("expert_") else ("tokens", "B")))
    gathered = {axis for _, axes in layout.gathered(role) for axis in axes}
    if set(summed) <= gathered or role in ("embed", "positions"):
        dx = layout.constrain(role, dx, "used")
    return (layout.constrain(role, dx, "stored"),)


_used.defvjp(_used_forward, _used_backward)


def _divides(dim: notation.Dim, size: int, mesh: Mapping[str, int], source: str) -> list[str]:
    """Returns the fault of a dim whose mesh axes do not divide it, or nothing."""
    parts = math.prod(mesh[axis] for axis in dim.axes)
    if size % parts == 0:
        return []
    axes = ", ".join(f"{axis}={mesh[axis]}" for axis in dim.axes)
    card = f" ({source})" if source else ""
    name = notation.LETTERS.get(dim.letter, dim.letter)
    return [
        f"{dim.letter} must divide by its mesh axes; got {dim.letter}={size}{card}, {axes}; "
        f"use {name} = {parts}, {2 * parts}, ... or a smaller mesh"
    ]


def _refuse_foreign(mesh: Mesh | AbstractMesh, axes: tuple[str, ...], source: str) -> None:
    """Refuses a caller's mesh that mixes axis types, lacks an axis, or has one of no use."""
    axis_type(mesh)
    missing = [axis for axis in axes if axis not in mesh.axis_names]
    idle = [axis for axis in free_axes(mesh) if axis not in axes and mesh.shape[axis] > 1]
    if missing or idle:
        shown = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
        raise LayoutError(
            f"{source}: mesh: must have the card's axes {list(axes)} and no other of more than one "
            f"device; got {shown}; name the axes alike, or write a card for this mesh"
        )


@contextlib.contextmanager
def _as_layout_error(source: str) -> Iterator[None]:
    """Turns a ConfigError of the mesh into a LayoutError that names the card."""
    try:
        yield
    except config.ConfigError as error:
        lines = (f"{source}: mesh.{key}: {message}" for key, message in error.faults)
        raise LayoutError("\n".join(lines)) from error
