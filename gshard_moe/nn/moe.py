"""The Mixture-of-Experts layer, as a function and as an nnx module.

B sequences, L tokens of each, M model width; G groups of S tokens, E experts, K choices.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from gshard_moe import config as configs
from gshard_moe import dispatch, exchange, losses, routing
from gshard_moe import layout as layouts
from gshard_moe.experts import ExpertWeights
from gshard_moe.layout import Layout
from gshard_moe.nn.parameter import constrain, matrix, optional, place


class MoEWeights(NamedTuple):
    """The weights of one MoE layer."""

    router_ME: Float[Array, "M E"]
    experts: ExpertWeights


class MoEMetrics(NamedTuple):
    """What one MoE layer did, float32; a Transformer stacks them on a leading MoE-layer dim.

    Attributes:
      aux_loss: load-balance loss, unweighted; 1 at perfect balance.
      z_loss: router z-loss, unweighted.
      load_E: assignments kept by each expert.
      dropped: share, in [0, 1], of the K choices of unmasked tokens that got no slot.
      entropy: mean entropy of the router, nats.
    """

    aux_loss: Float[Array, "..."]
    z_loss: Float[Array, "..."]
    load_E: Float[Array, "... E"]
    dropped: Float[Array, "..."]
    entropy: Float[Array, "..."]


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
    routing: routing.Routing | None = None,
    train: bool = False,
) -> MoEOutput:
    """Sends each token through its experts.

    Tokens are routed in groups of `group_size` consecutive tokens, row by row of [B, L]. A choice
    that finds its expert full is dropped and adds nothing; the residual connection, which is the
    caller's, still carries the token. Works in an Auto mesh, in an Explicit one (the body runs
    under `auto_axes`, and the result has the layout of `tokens`), inside `shard_map` and without a
    mesh.

    Args:
      weights: any float dtype; the experts compute in the dtype of `x_BLM`, the router in float32.
      x_BLM: token vectors.
      config: what is computed.
      layout: where it is computed; None leaves the layout to XLA.
      mask_BL: False for padding, which may hold anything, takes no slot and is in no statistics.
      routing: used instead of the router's own, for [B * L / S, S, K] choices; its own `keep_GSK`
        says which are padding.
      train: takes `capacity_factor`, else `eval_capacity_factor`.
    Returns:
      The output, in the dtype of `x_BLM`, and the metrics with both losses: add them, weighted, to
      the training loss.
    Raises:
      ValueError: if B * L does not divide by the group size, or a shape is not the config's.
      LayoutError: if a dim does not divide by its mesh axes, or the mesh mixes axis types.
    Source: GShard, arXiv 2006.16668, algorithm 2.
    """
    _check_shapes(weights, x_BLM, config, routing, mask_BL)
    run = functools.partial(_moe, config=config, layout=layout, train=train)
    mesh = _mesh_of(x_BLM, layout)
    if mesh.empty or layouts.axis_type(mesh) is not AxisType.Explicit:
        return run(weights, x_BLM, mask_BL, routing)
    spec = jax.typeof(x_BLM).sharding.spec if layout is None else layout.spec("tokens")
    tokens: Any = NamedSharding(mesh, layouts.free_spec(mesh, spec))
    whole: Any = NamedSharding(mesh, P())
    out_sharding = MoEOutput(tokens, MoEMetrics(*[whole] * len(MoEMetrics._fields)))
    explicit: Any = jax.sharding.auto_axes(
        run, axes=layouts.free_axes(mesh), out_sharding=out_sharding
    )
    return explicit(weights, x_BLM, mask_BL, routing)


def _mesh_of(x_BLM: jax.Array, layout: Layout | None) -> AbstractMesh:
    """Returns the mesh that is set, else that of the tokens' type, else the layout's."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        mesh = jax.typeof(x_BLM).sharding.mesh
    if mesh.empty and layout is not None and layout.bound_mesh is not None:
        mesh = layout.bound_mesh
    return mesh.abstract_mesh


def _moe(
    weights: MoEWeights,
    x_BLM: jax.Array,
    mask_BL: jax.Array | None,
    forced: routing.Routing | None,
    *,
    config: configs.MoEConfig,
    layout: Layout | None,
    train: bool,
) -> MoEOutput:
    lay = functools.partial(constrain, layout)
    batch, length, width = x_BLM.shape
    groups = (batch * length // config.group_size, config.group_size)
    x_GSM = lay("groups", x_BLM.reshape(*groups, width))
    mask_GS = None if mask_BL is None else mask_BL.reshape(groups)
    if mask_GS is not None:  # padding may hold anything, and NaN * 0 is NaN
        x_GSM = jnp.where(mask_GS[..., None], x_GSM, jnp.zeros((), x_GSM.dtype))
    with jax.named_scope("router"):
        chosen = forced
        if chosen is None:
            router_ME = place("router", weights.router_ME, layout)
            logits_GSE = lay("router_logits", routing.router_logits(x_GSM, router_ME))
            chosen = routing.top_k(logits_GSE, config, mask_GS=mask_GS)
    with jax.named_scope("dispatch"):
        slots = dispatch.assign(
            chosen,
            config.capacity(train=train),
            num_experts=config.num_experts,
            renormalize=config.renormalize,
        )
    y_GSM = exchange.spmd(
        x_GSM,
        slots,
        weights.experts,
        activation=config.activation,
        dispatch="gather" if layout is None else layout.config.compute.dispatch,
        constrain=lay,
        use=functools.partial(place, layout=layout),
    )
    y_BLM = lay("tokens", lay("groups", y_GSM).reshape(x_BLM.shape))
    return MoEOutput(y_BLM, _metrics(chosen, slots))


def _metrics(chosen: routing.Routing, slots: dispatch.Slots) -> MoEMetrics:
    load_E = dispatch.load(slots).sum(axis=0).astype(jnp.float32)
    asked = chosen.keep_GSK.sum().astype(jnp.float32)
    return MoEMetrics(
        aux_loss=losses.load_balance_loss(chosen.stats),
        z_loss=losses.z_loss(chosen.stats),
        load_E=load_E,
        dropped=(asked - load_E.sum()) / asked.clip(min=1.0),
        entropy=losses.mean_entropy(chosen.stats),
    )


def _check_shapes(
    weights: MoEWeights,
    x_BLM: jax.Array,
    config: configs.MoEConfig,
    forced: routing.Routing | None,
    mask_BL: jax.Array | None,
) -> None:
    if x_BLM.ndim != 3:
        raise ValueError(f"x_BLM: must have the dims [B, L, M]; got shape={list(x_BLM.shape)}")
    batch, length, width = x_BLM.shape
    faults = []
    if not jnp.issubdtype(x_BLM.dtype, jnp.floating):
        faults.append(f"x_BLM: must be of a float dtype; got {x_BLM.dtype}; embed token ids first")
    if not batch * length:
        faults.append(f"x_BLM: must hold at least one token; got B={batch}, L={length}")
    if mask_BL is not None and mask_BL.shape != (batch, length):
        faults.append(
            f"mask_BL: must have the shape [B, L] = {[batch, length]}; got {list(mask_BL.shape)}"
        )
    if mask_BL is not None and mask_BL.dtype != jnp.bool_:
        faults.append(f"mask_BL: must be of dtype bool; got {mask_BL.dtype}; use mask_BL != 0")
    if width != config.model_dim:
        faults.append(f"x_BLM: M must be model_dim; got M={width}, model_dim={config.model_dim}")
    if batch * length % config.group_size:
        faults.append(
            f"x_BLM: the tokens B * L must divide by group_size; got B={batch}, L={length}, "
            f"tokens={batch * length}, group_size={config.group_size}; use a group_size that "
            "divides them"
        )
    elif forced is not None:
        groups = batch * length // config.group_size
        want = (groups, config.group_size, config.top_k)
        if forced.expert_GSK.shape != want:
            faults.append(
                f"routing: choices must have the shape [G, S, K] = {list(want)}; "
                f"got {list(forced.expert_GSK.shape)}"
            )
    want = (config.model_dim, config.num_experts)
    if weights.router_ME.shape != want:
        faults.append(
            f"weights.router_ME: must have the shape [M, E] = {list(want)}; "
            f"got {list(weights.router_ME.shape)}"
        )
    if faults:
        raise ValueError("\n".join(faults))


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
        E, M, H = config.num_experts, config.model_dim, config.hidden_dim
        self.router = matrix(rngs, (M, E), "router", scale=config.router_init_scale)
        expert = functools.partial(matrix, rngs, batch=(-3,), scale=config.expert_init_scale)
        gated = config.activation == "swiglu"
        self.expert_in = expert((E, M, H), "expert_in")
        self.expert_gate = expert((E, M, H), "expert_in") if gated else None
        self.expert_out = expert((E, H, M), "expert_out")
        bias, gate_bias = config.bias, config.bias and gated
        self.expert_in_bias = optional(0.0, (E, H), "expert_in_bias", present=bias)
        self.expert_gate_bias = optional(0.0, (E, H), "expert_in_bias", present=gate_bias)
        self.expert_out_bias = optional(0.0, (E, M), "expert_out_bias", present=bias)

    @property
    def weights(self) -> MoEWeights:
        """The weights in the functional form's order."""
        expert_weights = ExpertWeights(
            in_EMH=self.expert_in[...],
            out_EHM=self.expert_out[...],
            gate_EMH=_value(self.expert_gate),
            in_bias_EH=_value(self.expert_in_bias),
            gate_bias_EH=_value(self.expert_gate_bias),
            out_bias_EM=_value(self.expert_out_bias),
        )
        return MoEWeights(self.router[...], expert_weights)

    def __call__(
        self,
        x_BLM: Float[Array, "B L M"],
        *,
        mask_BL: Bool[Array, "B L"] | None = None,
        routing: routing.Routing | None = None,
        train: bool = False,
        config: configs.MoEConfig | None = None,
    ) -> MoEOutput:
        """Sends each token through its experts; see `moe`.

        Args:
          x_BLM: token vectors.
          mask_BL: False for padding.
          routing: used instead of the router's own.
          train: takes `capacity_factor`, else `eval_capacity_factor`.
          config: instead of the module's own, for example `config.dropless(...)`.
        """
        return moe(
            self.weights,
            x_BLM,
            config or self.config,
            layout=self.layout,
            mask_BL=mask_BL,
            routing=routing,
            train=train,
        )


def _value(param: nnx.Param | None) -> jax.Array | None:
    return None if param is None else param[...]
