"""The MoE layer for Flax Linen: the parameters and the function of `gshard_moe.MoE` (nnx).

B sequences, L tokens of each, M model width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from gshard_moe import config as configs
from gshard_moe import routing
from gshard_moe.layout import Layout
from gshard_moe.nn import MoEOutput, MoEWeights, moe, moe_weights
from gshard_moe.nn.parameter import initializer


class MoE(nn.Module):
    """A Mixture-of-Experts layer for any Linen model: `y, metrics = MoE(config)(x)`.

    Parameters have the names, initialisers and meaning of the nnx module's, so weights may be
    copied from one to the other. With a layout each is boxed in `nn.Partitioned` with the axes
    that its role is split over: `nn.get_partition_spec` gives the specs of a whole model. Add the
    weighted losses of the metrics to the training loss: nothing is sown. DeepSeek's selection bias
    is a variable of the collection `selection_bias`: move it with `routing.moved_bias`.

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
        key: Key[Array, ""] | None = None,
        routing: routing.Routing | None = None,
        token_ids_BL: Int[Array, "B L"] | None = None,
        train: bool = False,
    ) -> MoEOutput:
        """Sends each token through its experts; arguments as in `gshard_moe.moe`."""
        return moe(
            self._weights(),
            x_BLM,
            self.config,
            layout=self.layout,
            mask_BL=mask_BL,
            key=key,
            routing=routing,
            token_ids_BL=token_ids_BL,
            train=train,
        )

    def _weights(self) -> MoEWeights:
        weights = {}
        for name, spec in moe_weights.specs(self.config).items():
            init = nn.initializers.zeros
            if spec.scale is not None:
                init = initializer(spec.shape, batch=spec.batch, scale=spec.scale)
            if spec.trained:
                weights[name] = self._param(name, init, spec.shape, spec.role)
            else:
                weights[name] = self.variable(name, name, jnp.zeros, spec.shape).value
        return moe_weights.collected(weights.get)

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
