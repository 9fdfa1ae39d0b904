"""How a model is laid out and run."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Literal

from gshard_moe.config.checked import Checked, ConfigError, Faults, shown

Dispatch = Literal["gather", "einsum", "ragged"]
Attention = Literal["auto", "xla", "flash"]
GroupedMatmulBackend = Literal["loops", "ragged_dot", "tokamax"]
GroupedMatmul = Literal["auto", GroupedMatmulBackend]
ChunkBy = Literal["auto", "expert", "capacity"]
Remat = Literal[
    "none", "full", "dots_saveable", "dots_with_no_batch_dims_saveable", "everything_saveable"
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig(Checked):
    """Names and sizes of the mesh axes, outermost first; one size may be -1: what is left."""

    axes: tuple[str, ...]
    shape: tuple[int, ...]

    def _check(self, faults: Faults) -> None:
        faults.require("axes", ("axes",), lambda: len(self.axes) > 0, "must name an axis or more")
        faults.require(
            "shape",
            ("axes", "shape"),
            lambda: len(self.axes) == len(self.shape),
            "must have one size for each axis",
        )
        faults.require(
            "axes",
            ("axes",),
            lambda: all(re.fullmatch("[A-Za-z][A-Za-z0-9_]*", axis) for axis in self.axes),
            "an axis must be a word of letters, digits and _, of ASCII",
        )
        faults.require(
            "axes",
            ("axes",),
            lambda: len(set(self.axes)) == len(self.axes),
            "an axis must be named once",
        )
        faults.require(
            "shape",
            ("shape",),
            lambda: self.shape.count(-1) <= 1,
            "at most one size may be -1 (what is left)",
        )
        faults.require(
            "shape",
            ("shape",),
            lambda: all(size > 0 or size == -1 for size in self.shape),
            "a size must be positive or -1",
        )

    def override(self, sizes: Mapping[str, int]) -> "MeshConfig":
        """Returns this mesh with other sizes for some of its axes.

        Raises:
          ConfigError: if an axis is not of this mesh, or a size not an integer.
        """
        unknown = [
            ("axes", f"an axis must be one of {list(self.axes)}; got {axis}={size}")
            for axis, size in sizes.items()
            if axis not in self.axes
        ]
        unknown += [
            ("shape", f"a size must be an integer; got {axis}={shown(size)}")
            for axis, size in sizes.items()
            if not isinstance(size, int)
        ]
        if unknown:
            raise ConfigError(unknown)
        pairs = zip(self.axes, self.shape, strict=True)
        shape = tuple(sizes.get(axis, size) for axis, size in pairs)
        return MeshConfig(axes=self.axes, shape=shape)

    def resolve(self, num_devices: int) -> tuple[int, ...]:
        """Returns the axis sizes on `num_devices` devices, with -1 filled in.

        Raises:
          ConfigError: if the mesh needs more devices than there are, or leaves some unused.
        """
        fixed = math.prod(size for size in self.shape if size != -1)
        mesh = ", ".join(f"{a}={s}" for a, s in zip(self.axes, self.shape, strict=True))
        needed = f"{fixed} device{'s' * (fixed != 1)}"
        numbers = f"got {mesh} ({needed}), devices={num_devices}"
        change = f"give other sizes (mesh=, --mesh), or {needed}"
        if fixed > num_devices:
            message = f"the mesh must not need more devices than there are; {numbers}; {change}"
            raise ConfigError([("shape", message)])
        if -1 in self.shape:
            if num_devices % fixed:
                message = f"the devices must divide by the fixed sizes; {numbers}; {change}"
                raise ConfigError([("shape", message)])
            return tuple(num_devices // fixed if size == -1 else size for size in self.shape)
        if fixed < num_devices:
            unused = num_devices - fixed
            message = f"the mesh must not leave devices unused ({unused} are); {numbers}; {change}"
            raise ConfigError([("shape", message)])
        return self.shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeConfig(Checked):
    """How the computation is written, where several ways give the same function.

    Attributes:
      dispatch: `gather` (indices into slots), `einsum` (slots by GShard's one-hot masks), or
        `ragged` (rows sorted by expert, without slots: what is not used costs nothing).
      grouped_matmul: of `ragged`: `loops` over tiles of rows, `jax.lax.ragged_dot`, or the kernels
        of `tokamax`; `auto` chooses by platform, see `experts.choose_backend`.
      attention: of whole sequences: `xla`, which writes the scores of all pairs to memory, or
        `flash`, a TPU's kernel, which does not (on a CPU it is interpreted, for tests); `auto`: the
        kernel on TPUs where shapes and layout let it run, see `nn.choose_attention`. With a cache,
        XLA's.
      layers: `scan` (one compiled block) or `unroll` (each block its own, for overlap across).
      unroll: blocks in one step of the scan.
      remat: what a block's backward recomputes: `none` keeps everything, `full` recomputes the
        block, the others are the policies of that name in `jax.checkpoint_policies`.
    """

    dispatch: Dispatch = "gather"
    grouped_matmul: GroupedMatmul = "auto"
    attention: Attention = "auto"
    layers: Literal["scan", "unroll"] = "scan"
    unroll: int = 1
    remat: Remat = "none"

    def _check(self, faults: Faults) -> None:
        faults.positive("unroll")

    @property
    def computes_again(self) -> bool:
        """Whether a block's backward computes any of its forward again."""
        return self.remat not in ("none", "everything_saveable")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayoutConfig(Checked):
    """Where the dimensions of every tensor live, as text: `"E/expert G/data C M"`.

    Attributes:
      roles: the layout of every role of `gshard_moe.layout.ROLES`.
      gather: axes dropped from a parameter's spec where it is used (stored sharded, used gathered).
      optimizer: other layouts, by role, for the master weights and the moments (ZeRO-1).
      user: a user's own tensors, by any name.
    """

    roles: Mapping[str, str]
    gather: tuple[str, ...] = ()
    optimizer: Mapping[str, str] = dataclasses.field(default_factory=dict)
    user: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExchangeConfig(Checked):
    """How tokens meet experts: one family, of which every member computes the same function.

    The devices of the expert axes are groups of `fetch`: tokens cross from group to group, and the
    weights of a group's experts are shared inside it.

    Attributes:
      tokens: `spmd`: annotations, from which XLA's partitioner makes the all-to-all (GShard);
        `all_to_all`: the same by `shard_map`; `ragged`: rows instead of slots, so that what is not
        used is not sent (dropless).
      fetch: devices of a group. 1: experts stay; `all`, of the expert axes: tokens stay (Janus).
        `auto`: of each layer what sends the fewest bytes in a training step.
      weights: how a group shares them: `ring`: each device hands them on, and computes meanwhile;
        `gather`: at once.
      prefetch: of a ring: how many devices' weights are on their way while one's are used.
      chunks: into how many pieces the slots are cut, so that one travels while another is computed.
      chunk_by: `expert`, `capacity`, or `auto`: by expert where a device has as many.
      links: `any`, or `one`: tokens' all-to-all and the tensor-parallel gathers and sums take
        turns.
      levels: two axes that E is split over, the slower links' first: tokens travel between the
        first's devices once, however many of their experts are there.
      link_ratio: bandwidth of the second level's links over the first's, by which `fetch = "auto"`
        weighs bytes; default: NVLink to InfiniBand, 450 to 50 GB/s.
    """

    tokens: Literal["spmd", "all_to_all", "ragged"] = "spmd"
    fetch: int | Literal["all", "auto"] = 1
    weights: Literal["ring", "gather"] = "ring"
    prefetch: int = 1
    chunks: int = 1
    chunk_by: ChunkBy = "auto"
    links: Literal["any", "one"] = "any"
    levels: tuple[str, ...] = ()
    link_ratio: float = 9.0

    def fetch_of(self, devices: int) -> int | Literal["auto"]:
        """Returns `fetch` where the expert axes have so many devices."""
        return devices if self.fetch == "all" else self.fetch

    def _check(self, faults: Faults) -> None:
        faults.positive("chunks", "prefetch", "link_ratio")
        faults.require(
            "fetch",
            ("fetch",),
            lambda: isinstance(self.fetch, str) or self.fetch > 0,
            "must be positive",
        )
        faults.require(
            "levels",
            ("levels",),
            lambda: len(self.levels) in (0, 2) and len(set(self.levels)) == len(self.levels),
            "must be none, or two axes, the slower links' first",
        )
        faults.require(
            "link_ratio",
            ("fetch", "levels", "link_ratio"),
            lambda: (
                self.link_ratio == type(self).link_ratio
                or (self.fetch == "auto" and self.levels != ())
            ),
            'must be left out but with fetch = "auto" and levels: nothing else weighs links',
        )
        faults.require(
            "weights",
            ("weights", "levels"),
            lambda: self.weights == "ring" or not self.levels,
            'must be "ring" with levels: it goes between nodes, whose devices gather',
        )
        of_shard_map = {"fetch": 1, "levels": (), "links": "any", "weights": "ring", "prefetch": 1}
        for key, default in of_shard_map.items():
            faults.require(
                key,
                ("tokens", key),
                lambda key=key, default=default: (
                    self.tokens != "spmd" or getattr(self, key) == default
                ),
                f'must be {shown(default)} with tokens = "spmd", whose collectives XLA chooses',
            )
        of_slots = {
            "fetch": (1, "its experts stay, and each row goes to them"),
            "levels": ((), "each row goes straight to its expert's device"),
            "links": ("any", "its rows are not cut, so that no two pieces could take turns"),
        }
        for key, (default, reason) in of_slots.items():
            faults.require(
                key,
                ("tokens", key),
                lambda key=key, default=default: (
                    self.tokens != "ragged" or getattr(self, key) == default
                ),
                f'must be {shown(default)} with tokens = "ragged": {reason}; use "all_to_all"',
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardingConfig(Checked):
    """A sharding card: how a model is laid out and run."""

    mesh: MeshConfig
    layout: LayoutConfig
    compute: ComputeConfig = dataclasses.field(default_factory=ComputeConfig)
    exchange: ExchangeConfig = dataclasses.field(default_factory=ExchangeConfig)

    def _check(self, faults: Faults) -> None:
        faults.require(
            "exchange.chunks",
            ("exchange", "compute"),
            lambda: self.exchange.chunks == 1 or self.compute.dispatch != "ragged",
            'must be 1 with compute.dispatch = "ragged": its rows are not cut',
        )
        faults.require(
            "exchange.tokens",
            ("exchange", "compute"),
            lambda: (self.exchange.tokens == "ragged") <= (self.compute.dispatch == "ragged"),
            'as "ragged" needs compute.dispatch = "ragged", which makes rows',
        )
        faults.require(
            "exchange.tokens",
            ("exchange", "compute"),
            lambda: self.exchange.tokens != "all_to_all" or self.compute.dispatch != "ragged",
            'as "all_to_all" needs slots: use compute.dispatch = "gather", or tokens = "ragged"',
        )
