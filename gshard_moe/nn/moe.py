"""The Mixture-of-Experts layer, as a function and as an nnx module.

B sequences, L tokens of each, M model width; G groups of S tokens, E experts, K choices.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Key

from gshard_moe import config as configs
from gshard_moe import dispatch, exchange, experts, losses, routing
from gshard_moe import layout as layouts
from gshard_moe.layout import Layout
from gshard_moe.nn import moe_checks, moe_weights
from gshard_moe.nn.moe_weights import MoEWeights
from gshard_moe.nn.parameter import constant, constrain, matrix, place
from gshard_moe.nn.shared_experts import shared_experts


class MoEMetrics(NamedTuple):
    """What one MoE layer did, float32; a Transformer stacks them on a leading MoE-layer dim.

    Attributes:
      aux_loss: load-balance loss, unweighted, at the config's scale; see `losses`.
      z_loss: router z-loss, unweighted.
      importance_loss, load_loss: Shazeer's two, unweighted; 0 at balance.
      load_E: assignments kept by each expert.
      chosen_E: assignments that were asked for, before any was dropped.
      dropped: share, in [0, 1], of the K choices of unmasked tokens that got no slot. With
        rerouting and expert choice: of the tokens. A second expert that GShard's paper skips at
        random is none of them: it has its slot, with the gate 0.
      dropped_K: the same for each of the K choices.
      load_max_over_mean: the busiest expert's load over the mean load; 0 without any.
      unused: experts without a token.
      entropy: mean entropy of the router, nats; log E is undecided.
      confidence: mean of each token's largest probability; 1 / E is undecided.
    """

    aux_loss: Float[Array, "..."]
    z_loss: Float[Array, "..."]
    importance_loss: Float[Array, "..."]
    load_loss: Float[Array, "..."]
    load_E: Float[Array, "... E"]
    chosen_E: Float[Array, "... E"]
    dropped: Float[Array, "..."]
    dropped_K: Float[Array, "... K"]
    load_max_over_mean: Float[Array, "..."]
    unused: Float[Array, "..."]
    entropy: Float[Array, "..."]
    confidence: Float[Array, "..."]

    def weighted_loss(self, config: configs.MoEConfig) -> Float[Array, ""]:
        """Returns what is added to the training loss: the weighted losses, mean over layers."""
        return (
            config.aux_loss_weight * self.aux_loss.mean()
            + config.z_loss_weight * self.z_loss.mean()
            + config.importance_loss_weight * self.importance_loss.mean()
            + config.load_loss_weight * self.load_loss.mean()
        )


class MoEOutput(NamedTuple):
    """The layer's output, to be added to the residual, and its metrics."""

    y_BLM: Float[Array, "B L M"]
    metrics: MoEMetrics


def moe(
    weights: MoEWeights,
    x_BLM: Float[Array, "B L M"],
    config: configs.MoEConfig,
    *,
    layout: Layout | None = None,
    mask_BL: Bool[Array, "B L"] | None = None,
    key: Key[Array, ""] | None = None,
    routing: routing.Routing | None = None,
    token_ids_BL: Int[Array, "B L"] | None = None,
    train: bool = False,
) -> MoEOutput:
    """Sends each token through its experts.

    Tokens are routed in groups of `group_size` consecutive tokens, row by row of [B, L]. A choice
    that finds its expert full is dropped and adds nothing; the residual connection, which is the
    caller's, still carries the token. Where nothing is dropped the groups change nothing, and
    B * L may be anything: if it does not divide by the group size, each row is a group, and if the
    rows do not divide by the layout's axes, there are masked ones beside them (not in an Explicit
    mesh, nor with a `routing`).

    How tokens are moved, the layout's `exchange` and `compute.dispatch` say; without a layout,
    slots by `gather`, or rows where there is no mesh and nothing is dropped.

    Works in an Auto mesh, in an Explicit one (the body runs under `auto_axes`, and the result has
    the layout of `tokens`), inside `shard_map` and without a mesh.

    Args:
      weights: any float dtype; the experts compute in the dtype of `x_BLM`, the router in float32.
      x_BLM: token vectors.
      config: what is computed.
      layout: where it is computed; None leaves the layout to XLA.
      mask_BL: False for padding, which may hold anything, takes no slot and is in no statistics.
      key: of this layer and step; needed in training by configs with noise, a random second expert
        or dropout. Each group's randomness is its own, so it is the same on any mesh; inside
        `shard_map` too, if the layout says how the groups are split. Without a layout every device
        there would draw alike: fold its number into the key.
      routing: used instead of the router's own, for [B * L / S, S, K] choices. `route` returns one,
        and `routing.replayed` makes one of given experts. What its `keep_GSK` or `mask_BL` calls
        padding gets no slot, nor does an expert outside of 0 to E - 1; its statistics stay its own.
      token_ids_BL: of the router `hash`.
      train: takes `capacity_factor`, and noise; else `eval_capacity_factor`.
    Returns:
      The output, in the dtype of `x_BLM`, and the metrics with both losses: add them, weighted, to
      the training loss.
    Raises:
      ValueError: if B * L does not divide by the group size, a shape or dtype is not the config's,
        or randomness is asked for without a key.
      LayoutError: if a dim does not divide by its mesh axes, the mesh mixes axis types, or the
        layout does not suit its exchange.
    Source: GShard, arXiv 2006.16668, algorithm 2.
    """
    config = config.grouped(x_BLM.shape[:2], train=train)
    moe_checks.check_shapes(weights, x_BLM, config, routing, mask_BL, token_ids_BL)
    moe_checks.check_key(config, key, train=train)
    if layout is not None:
        layout.check_exchange(experts.ROLES[name] for name in weights.experts.held())
    run = functools.partial(_moe, config=config, layout=layout, train=train)
    mesh = _mesh_of(x_BLM, layout)
    if mesh.empty or layouts.axis_type(mesh) is not AxisType.Explicit:
        more = 0 if routing is not None else _rows_to_add(x_BLM, config, layout, train=train)
        if not more:
            return run(weights, x_BLM, mask_BL, key, routing, token_ids_BL)
        there_BL = jnp.ones(x_BLM.shape[:2], bool) if mask_BL is None else mask_BL
        longer = functools.partial(_longer, more=more)
        if token_ids_BL is not None:
            token_ids_BL = longer(token_ids_BL)
        inputs = longer(x_BLM), longer(there_BL), key, None, token_ids_BL
        y_BLM, metrics = run(weights, *inputs)
        return MoEOutput(y_BLM[: x_BLM.shape[0]], metrics)
    spec = jax.typeof(x_BLM).sharding.spec if layout is None else layout.spec("tokens")
    tokens: Any = NamedSharding(mesh, layouts.free_spec(mesh, spec))
    whole: Any = NamedSharding(mesh, P())
    out_sharding = MoEOutput(tokens, MoEMetrics(*[whole] * len(MoEMetrics._fields)))
    explicit: Any = jax.sharding.auto_axes(
        run, axes=layouts.free_axes(mesh), out_sharding=out_sharding
    )
    return explicit(weights, x_BLM, mask_BL, key, routing, token_ids_BL)


def route(
    weights: MoEWeights,
    x_BLM: Float[Array, "B L M"],
    config: configs.MoEConfig,
    *,
    layout: Layout | None = None,
    mask_BL: Bool[Array, "B L"] | None = None,
    key: Key[Array, ""] | None = None,
    token_ids_BL: Int[Array, "B L"] | None = None,
    train: bool = False,
) -> routing.Routing:
    """Returns the routing that `moe` would use; arguments as there.

    To look at, to record, or to hand back to `moe`. Not for expert choice, where experts choose.
    """
    config = config.grouped(x_BLM.shape[:2], train=train)
    moe_checks.check_shapes(weights, x_BLM, config, None, mask_BL, token_ids_BL)
    moe_checks.check_key(config, key, train=train)
    if config.router == "expert_choice":
        raise ValueError(
            "router: must be one where tokens choose; got router='expert_choice', which makes no "
            "Routing; use dispatch.expert_choice"
        )
    groups = _groups(x_BLM, mask_BL, token_ids_BL, config, layout)
    noise, _ = _keys(key if train else None, groups.x_GSM, layout)
    return _route(weights, groups, config, layout, noise, x_BLM.shape)


def _rows_to_add(
    x_BLM: jax.Array, config: configs.MoEConfig, layout: Layout | None, *, train: bool
) -> int:
    """Returns how many rows of padding let any number of tokens be split, where none is dropped."""
    if layout is None or not config.is_unlimited(train=train):
        return 0
    parts = {"groups": _parts(layout, "groups", "G"), "tokens": _parts(layout, "tokens", "B")}
    batch, length, _ = x_BLM.shape
    # Whole rows that are whole groups, as many as there are parts of both.
    step = math.lcm(config.group_size * parts["groups"], length * parts["tokens"], length)
    return -(batch * length) % step // length


def _parts(layout: Layout | None, role: str, letter: str) -> int:
    """Returns into how many parts a dim of the arrays here is split; manual axes have done it."""
    if layout is None:
        return 1
    mesh = jax.sharding.get_abstract_mesh()
    free = layout.axes if mesh.empty else layouts.free_axes(mesh)
    axes = [axis for axis in layout.axes_of(role, letter) if axis in free]
    return math.prod(layout.axis_sizes[axis] for axis in axes)


def _longer(x: jax.Array, more: int) -> jax.Array:
    return jnp.pad(x, ((0, more), *[(0, 0)] * (x.ndim - 1)))


def _mesh_of(x_BLM: jax.Array, layout: Layout | None) -> AbstractMesh:
    """Returns the mesh that is set, else that of the tokens' type, else the layout's."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        mesh = jax.typeof(x_BLM).sharding.mesh
    if mesh.empty and layout is not None and layout.bound_mesh is not None:
        mesh = layout.bound_mesh
    return mesh.abstract_mesh


class _Groups(NamedTuple):
    """A layer's inputs, in groups."""

    x_GSM: jax.Array
    mask_GS: jax.Array | None
    token_ids_GS: jax.Array | None


def _moe(
    weights: MoEWeights,
    x_BLM: jax.Array,
    mask_BL: jax.Array | None,
    key: jax.Array | None,
    forced: routing.Routing | None,
    token_ids_BL: jax.Array | None,
    *,
    config: configs.MoEConfig,
    layout: Layout | None,
    train: bool,
) -> MoEOutput:
    lay = functools.partial(constrain, layout)
    groups = _groups(x_BLM, mask_BL, token_ids_BL, config, layout)
    noise_key_G, dropout_key_G = _keys(key if train else None, groups.x_GSM, layout)
    with jax.named_scope("router"):
        if forced is not None:
            chosen, slots = _without_padding(forced, groups.mask_GS), None
        elif config.router == "expert_choice":
            chosen, slots = _expert_choice(
                weights, groups, config, layout, noise_key_G, x_BLM.shape, train=train
            )
        else:
            chosen = _route(weights, groups, config, layout, noise_key_G, x_BLM.shape)
            slots = None
        if config.capacity_rule == "easydel" and not config.is_unlimited(train=train):
            limit = config.capacity(train=train)
            chosen = dispatch.softened(chosen, limit, num_experts=config.num_experts)
    common: Any = {
        "config": config,
        "dropout_key_G": dropout_key_G if config.expert_dropout else None,
    }
    if _takes_rows(x_BLM, config, layout, train=train):
        with jax.named_scope("dispatch"):
            served, limit = _served(chosen, slots, config, train=train)
        y_GSM = exchange.ragged(
            groups.x_GSM,
            served,
            weights.experts,
            layout=layout,
            slots_of_group=limit,
            distinct=forced is None,  # a router's are
            **common,
        )
    else:
        with jax.named_scope("dispatch"):
            if slots is None:
                slots = _slots(chosen, config, train=train)
            served = dispatch.served_slots(slots)
        # Sampling has groups of a few tokens.
        common["fewer"] = not train
        if layout is not None and layout.config.exchange.tokens == "all_to_all":
            levels = layout.config.exchange.levels
            member = exchange.two_level if levels else exchange.all_to_all
            y_GSM = member(groups.x_GSM, slots, weights.experts, layout=layout, **common)
        else:
            y_GSM = exchange.spmd(
                groups.x_GSM,
                slots,
                weights.experts,
                dispatch="gather" if layout is None else layout.config.compute.dispatch,
                constrain=lay,
                use=functools.partial(place, layout=layout),
                chunks=1 if layout is None else layout.config.exchange.chunks,
                chunk_by="auto" if layout is None else layout.config.exchange.chunk_by,
                expert_parts=_parts(layout, "slots_wire", "E"),
                **common,
            )
    y_BLM = lay("tokens", lay("groups", y_GSM).reshape(x_BLM.shape))
    if weights.shared is not None:
        with jax.named_scope("shared"):
            x_BLM = _cleared(x_BLM, mask_BL)
            y_BLM = y_BLM + shared_experts(weights.shared, x_BLM, config, layout)
            y_BLM = lay("tokens", y_BLM)
    return MoEOutput(y_BLM, _metrics(chosen, served, config, x_BLM.shape))


def _groups(
    x_BLM: jax.Array,
    mask_BL: jax.Array | None,
    token_ids_BL: jax.Array | None,
    config: configs.MoEConfig,
    layout: Layout | None,
) -> _Groups:
    """Cuts the tokens into groups, and clears the padding."""
    batch, length, width = x_BLM.shape
    shape = (batch * length // config.group_size, config.group_size)
    x_GSM = constrain(layout, "groups", x_BLM.reshape(*shape, width))
    mask_GS = None if mask_BL is None else mask_BL.reshape(shape)
    return _Groups(
        _cleared(x_GSM, mask_GS),
        mask_GS,
        None if token_ids_BL is None else token_ids_BL.reshape(shape),
    )


def _cleared(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Zeroes padding, which may hold anything: NaN * 0 is NaN."""
    return x if mask is None else jnp.where(mask[..., None], x, jnp.zeros((), x.dtype))


def _keys(
    key: jax.Array | None, x_GSM: jax.Array, layout: Layout | None
) -> tuple[jax.Array | None, jax.Array | None]:
    """Returns each group's keys for the router and for the experts' dropout."""
    if key is None:
        return None, None
    noise_key, dropout_key = jax.random.split(key)
    keys = functools.partial(
        routing.group_keys, num_groups=x_GSM.shape[0], group_ids_G=_group_ids(x_GSM, layout)
    )
    return keys(noise_key), keys(dropout_key)


def _group_ids(x_GSM: jax.Array, layout: Layout | None) -> jax.Array | None:
    """Returns the groups' numbers in the whole batch, of which `shard_map` has given us a part.

    It has, along the manual axes that the groups are split over and vary over; None: it has not.
    """
    if layout is None:
        return None
    manual = jax.typeof(x_GSM).manual_axis_type.varying
    axes = layout.axes_of("groups", "G")
    mine = [axis for axis in axes if axis in manual]
    if not mine:
        return None
    sizes = {axis: jax.lax.axis_size(axis) for axis in mine}
    sizes |= {axis: layout.axis_sizes[axis] for axis in axes if axis not in mine}
    parts = math.prod(size for axis, size in sizes.items() if axis not in mine)
    whole = x_GSM.shape[0] * math.prod(sizes[axis] for axis in mine)
    if x_GSM.shape[0] % parts:
        raise ValueError(
            f"x_BLM: the groups must divide by the axes they are split over, for their "
            f"randomness; got {x_GSM.shape[0]} groups, axes={sizes}"
        )
    ids = jnp.arange(whole).reshape(*[sizes[axis] for axis in axes], -1)
    for dim, axis in reversed(list(enumerate(axes))):
        if axis in mine:
            ids = jax.lax.dynamic_index_in_dim(ids, jax.lax.axis_index(axis), dim, keepdims=False)
    return ids.reshape(-1)


def _logits(
    weights: MoEWeights,
    groups: _Groups,
    config: configs.MoEConfig,
    layout: Layout | None,
    key_G: jax.Array | None,
) -> jax.Array:
    """Returns the router's logits, of a jittered input where the config says so."""
    x_GSM, bias_E = groups.x_GSM, weights.router_bias_E
    if config.noise == "input_jitter" and key_G is not None:
        x_GSM = routing.jittered(x_GSM, key_G, config.noise_scale)
    router_ME = place("router", weights.router_ME, layout)
    if bias_E is not None:
        bias_E = place("router_bias", bias_E, layout)
    return constrain(layout, "router_logits", routing.router_logits(x_GSM, router_ME, bias_E))


def _route(
    weights: MoEWeights,
    groups: _Groups,
    config: configs.MoEConfig,
    layout: Layout | None,
    key_G: jax.Array | None,
    shape_BLM: tuple[int, ...],
) -> routing.Routing:
    bias_E = weights.selection_bias_E
    return routing.route(
        _logits(weights, groups, config, layout, key_G),
        config,
        key_G=key_G,
        mask_GS=groups.mask_GS,
        selection_bias_E=None if bias_E is None else place("router_bias", bias_E, layout),
        token_ids_GS=groups.token_ids_GS,
        run=_run(config, shape_BLM),
    )


def _expert_choice(
    weights: MoEWeights,
    groups: _Groups,
    config: configs.MoEConfig,
    layout: Layout | None,
    key_G: jax.Array | None,
    shape_BLM: tuple[int, ...],
    *,
    train: bool,
) -> tuple[routing.Routing, dispatch.Slots]:
    """Returns what tokens would have chosen, for the statistics, and what experts chose."""
    logits_GSE = _logits(weights, groups, config, layout, key_G)
    if key_G is not None and config.noise.startswith("logits"):
        logits_GSE = routing.noisy(logits_GSE, key_G, config)
    wished = routing.top_k(logits_GSE, config, mask_GS=groups.mask_GS, run=_run(config, shape_BLM))
    slots = dispatch.expert_choice(
        routing.probabilities(logits_GSE, config),
        config.capacity(train=train),
        mask_GS=groups.mask_GS,
        scale=config.routed_scaling,
    )
    return wished, slots


def _takes_rows(
    x_BLM: jax.Array, config: configs.MoEConfig, layout: Layout | None, *, train: bool
) -> bool:
    """Whether the layer computes in rows: as the card says, or if dropless and on no mesh.

    Slots for every token of a group in every expert would cost E / K times as much.
    """
    if layout is not None:
        return layout.config.compute.dispatch == "ragged"
    return config.is_dropless(train=train) and _mesh_of(x_BLM, None).empty


def _without_padding(forced: routing.Routing, mask_GS: jax.Array | None) -> routing.Routing:
    if mask_GS is None:
        return forced
    return forced._replace(keep_GSK=forced.keep_GSK & mask_GS[..., None])


def _slots(chosen: routing.Routing, config: configs.MoEConfig, *, train: bool) -> dispatch.Slots:
    return dispatch.assign(
        chosen,
        config.slots(train=train),
        num_experts=config.num_experts,
        renormalize=config.renormalize,
        gate_sum=config.routed_scaling,
    )


def _served(
    chosen: routing.Routing,
    slots: dispatch.Slots | None,
    config: configs.MoEConfig,
    *,
    train: bool,
) -> tuple[dispatch.Served, int | None]:
    """Returns who is served, and at most how many choices of a group; None: all of them."""
    if slots is None and config.is_dropless(train=train):
        served = dispatch.serve_all(
            chosen,
            num_experts=config.num_experts,
            renormalize=config.renormalize,
            gate_sum=config.routed_scaling,
        )
        return served, None
    if slots is None:
        slots = _slots(chosen, config, train=train)
    return dispatch.served_slots(slots), math.prod(slots.token_GEC.shape[1:])


def _run(config: configs.MoEConfig, shape_BLM: tuple[int, ...]) -> int:
    """Returns the tokens of a run of the statistics: groups and sequences are whole runs."""
    if config.aux_loss_scope == "sequence":
        return math.gcd(config.group_size, shape_BLM[1])
    return config.group_size


def _metrics(
    chosen: routing.Routing,
    served: dispatch.Served,
    config: configs.MoEConfig,
    shape_BLM: tuple[int, ...],
) -> MoEMetrics:
    stats = chosen.stats
    in_groups = losses.in_runs_of(stats, served.expert_GSK.shape[0])
    load_E = dispatch.load(served, config.num_experts).sum(axis=0).astype(jnp.float32)
    served_GSK, asked_GSK = served.expert_GSK >= 0, chosen.keep_GSK
    if chosen.order is routing.Order.FALLBACK or config.router == "expert_choice":
        served_GSK = served_GSK.any(axis=-1, keepdims=True)
        asked_GSK = asked_GSK[..., :1]
    asked_K = asked_GSK.sum(axis=(0, 1)).astype(jnp.float32)
    dropped_K = (asked_GSK & ~served_GSK).sum(axis=(0, 1)).astype(jnp.float32)
    return MoEMetrics(
        aux_loss=losses.load_balance_loss(
            stats,
            scale=config.aux_loss_scale,
            scope=config.aux_loss_scope,
            num_sequences=shape_BLM[0],
        ),
        z_loss=losses.z_loss(stats),
        importance_loss=losses.importance_loss(in_groups),
        load_loss=losses.load_loss(in_groups),
        load_E=load_E,
        chosen_E=stats.chosen_GE.sum(axis=0),
        dropped=dropped_K.sum() / asked_K.sum().clip(min=1.0),
        dropped_K=dropped_K / asked_K.clip(min=1.0),
        load_max_over_mean=load_E.max() / load_E.mean().clip(min=1e-9),
        unused=(load_E == 0).sum().astype(jnp.float32),
        entropy=losses.mean_entropy(stats),
        confidence=losses.mean_confidence(stats),
    )


class SelectionBias(nnx.Variable):
    """DeepSeek's selection bias: part of the model's state, and of no optimiser's."""


class MoE(nnx.Module):
    """A Mixture-of-Experts layer for any Flax model: `y, metrics = moe(x)`.

    The weights are float32; the experts compute in the dtype of the input. Add
    `config.aux_loss_weight * metrics.aux_loss + config.z_loss_weight * metrics.z_loss` to the
    training loss: nothing is sown, so nothing is lost under jit, scan or remat.

    Attributes:
      config: what is computed.
      layout: where; None leaves it to XLA.
      router, expert_in, expert_gate, expert_out, ...: the parameters, each with its layout role as
        the metadata `role`; None where the config has none.
    """

    def __init__(self, config: configs.MoEConfig, *, layout: Layout | None = None, rngs: nnx.Rngs):
        """Initialises the weights.

        Args:
          config: what is computed.
          layout: where it is computed.
          rngs: the stream `params` is used.
        """
        self.config = config
        self.layout = layout
        specs = moe_weights.specs(config)
        for name in moe_weights.PLACES:
            spec = specs.get(name)
            if spec is None:
                param = None
            elif not spec.trained:
                param = SelectionBias(jnp.zeros(spec.shape), role=spec.role)
            elif spec.scale is None:
                param = constant(0.0, spec.shape, spec.role)
            else:
                param = matrix(rngs, spec.shape, spec.role, batch=spec.batch, scale=spec.scale)
            setattr(self, name, param)

    @property
    def weights(self) -> MoEWeights:
        """The weights in the functional form's order."""

        def value(name: str) -> jax.Array | None:
            param = getattr(self, name)
            return None if param is None else param[...]

        return moe_weights.collected(value)

    def move_selection_bias(self, metrics: MoEMetrics) -> None:
        """Moves the selection bias against the load, after a step; see `routing.moved_bias`.

        Args:
          metrics: of the step.
        Raises:
          ValueError: if the config has no selection bias.
        """
        bias: SelectionBias | None = getattr(self, "selection_bias")  # noqa: B009
        if bias is None:
            raise ValueError("move_selection_bias: the config must have selection_bias=True")
        rate = self.config.selection_bias_rate
        bias[...] = routing.moved_bias(bias[...], metrics.chosen_E, rate=rate)

    def __call__(
        self,
        x_BLM: Float[Array, "B L M"],
        *,
        mask_BL: Bool[Array, "B L"] | None = None,
        key: Key[Array, ""] | None = None,
        routing: routing.Routing | None = None,
        token_ids_BL: Int[Array, "B L"] | None = None,
        train: bool = False,
        config: configs.MoEConfig | None = None,
    ) -> MoEOutput:
        """Sends each token through its experts; see `moe`.

        Args:
          x_BLM: token vectors.
          mask_BL: False for padding.
          key: of this step, where training is random.
          routing: used instead of the router's own.
          token_ids_BL: of the router `hash`.
          train: takes `capacity_factor`, else `eval_capacity_factor`.
          config: instead of the module's own, for example `config.dropless(...)`.
        """
        return moe(
            self.weights,
            x_BLM,
            config or self.config,
            layout=self.layout,
            mask_BL=mask_BL,
            key=key,
            routing=routing,
            token_ids_BL=token_ids_BL,
            train=train,
        )
