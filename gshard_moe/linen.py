"""The MoE layer for Flax Linen: the parameters and the function of `gshard_moe.MoE` (nnx).

B sequences, L tokens of each, M model width.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gshard_moe import config as configs
from gshard_moe import routing
from gshard_moe.experts import ExpertWeights
from gshard_moe.layout import Layout
from gshard_moe.nn import MoEOutput, MoEWeights, moe
from gshard_moe.nn.parameter import initializer


class MoE(nn.Module):
    """A Mixture-of-Experts layer for any Linen model: `y, metrics = MoE(config)(x)`.

    Parameters have the names, initialisers and meaning of the nnx module's, so weights may be
    copied from one to the other. With a layout each is boxed in `nn.Partitioned` with the axes
    that its role is split over: `nn.get_partition_spec` gives the specs of a whole model. Add the
    weighted losses of the metrics to the training loss: nothing is sown.

    Attributes:
      config: what is computed.
      layout: where; None leaves it to XLA.
    """

    config: configs.MoEConfig
    layout: Layout | None = None

    @nn.compact
    def __call__(
        self,
        x_BLM: Float[Array, "B L M"],
        *,
        mask_BL: Bool[Array, "B L"] | None = None,
        routing: routing.Routing | None = None,
        train: bool = False,
    ) -> MoEOutput:
        """Sends each token through its experts; arguments as in `gshard_moe.moe`."""
        return moe(
            self._weights(),
            x_BLM,
            self.config,
            layout=self.layout,
            mask_BL=mask_BL,
            routing=routing,
            train=train,
        )

    def _weights(self) -> MoEWeights:
        config = self.config
        E, M, H = config.num_experts, config.model_dim, config.hidden_dim
        router_ME = self._matrix("router", (M, E), "router", scale=config.router_init_scale)
        expert = functools.partial(self._matrix, batch=(-3,), scale=config.expert_init_scale)
        gated = config.activation == "swiglu"
        bias = self._bias if config.bias else lambda *_: None
        weights = ExpertWeights(
            in_EMH=expert("expert_in", (E, M, H), "expert_in"),
            gate_EMH=expert("expert_gate", (E, M, H), "expert_in") if gated else None,
            out_EHM=expert("expert_out", (E, H, M), "expert_out"),
            in_bias_EH=bias("expert_in_bias", (E, H), "expert_in_bias"),
            gate_bias_EH=bias("expert_gate_bias", (E, H), "expert_in_bias") if gated else None,
            out_bias_EM=bias("expert_out_bias", (E, M), "expert_out_bias"),
        )
        return MoEWeights(router_ME, weights)

    def _matrix(
        self, name: str, shape: tuple[int, ...], role: str, *, scale: float, batch=()
    ) -> jax.Array:
        return self._param(name, initializer(shape, batch=batch, scale=scale), shape, role)

    def _bias(self, name: str, shape: tuple[int, ...], role: str) -> jax.Array:
        return self._param(name, nn.initializers.zeros, shape, role)

    def _param(
        self,
        name: str,
        init: nn.initializers.Initializer,
        shape: tuple[int, ...],
        role: str,
    ) -> jax.Array:
        if self.layout is not None:
            init = nn.with_partitioning(init, tuple(self.layout.spec(role)))
        # Not unboxed by Linen, which would constrain it to the mesh that is set, manual axes and
        # all: `moe` lays it out.
        param = self.param(name, init, shape, jnp.float32, unbox=False)
        return param.value if isinstance(param, nn.Partitioned) else param
