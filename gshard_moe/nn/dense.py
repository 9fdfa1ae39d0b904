"""The dense feed-forward network of the blocks that are not MoE.

B sequences, L tokens, M model width, F hidden width.
"""

from flax import nnx
from jaxtyping import Array, Float

from gshard_moe import config as configs
from gshard_moe.experts import activate
from gshard_moe.layout import Layout
from gshard_moe.nn.parameter import broadcast, constrain, linear, matrix, optional, used


class DenseFFN(nnx.Module):
    """Two linear layers (three with SwiGLU) around an activation."""

    def __init__(
        self, config: configs.ModelConfig, *, layout: Layout | None = None, rngs: nnx.Rngs
    ):
        """Initialises the weights; the stream `params` is used."""
        self.config = config
        self.layout = layout
        M, F = config.model_dim, config.dense_hidden_dim
        gated = config.activation == "swiglu"
        self.dense_in = matrix(rngs, (M, F), "dense_in")
        self.dense_gate = matrix(rngs, (M, F), "dense_in") if gated else None
        self.dense_out = matrix(rngs, (F, M), "dense_out")
        self.in_bias = optional(0.0, (F,), "dense_in_bias", present=config.bias)
        self.gate_bias = optional(0.0, (F,), "dense_in_bias", present=config.bias and gated)
        self.out_bias = optional(0.0, (M,), "vector", present=config.bias)

    def __call__(self, x_BLM: Float[Array, "B L M"]) -> Float[Array, "B L M"]:
        """Applies the network to each token."""
        h_BLF = self._hidden(x_BLM, self.dense_in, self.in_bias)
        gate_BLF = None
        if self.dense_gate is not None:
            gate_BLF = self._hidden(x_BLM, self.dense_gate, self.gate_bias)
        h_BLF = activate(self.config.activation, h_BLF, gate_BLF)
        y_BLM = linear("blf,fm->blm", h_BLF, self.dense_out, self.layout)
        if self.out_bias is not None:
            y_BLM = y_BLM + broadcast(used(self.out_bias, self.layout, x_BLM.dtype), y_BLM)
        return constrain(self.layout, "tokens", y_BLM)

    def _hidden(
        self, x_BLM: Float[Array, "B L M"], weight: nnx.Param, bias: nnx.Param | None
    ) -> Float[Array, "B L F"]:
        h_BLF = linear("blm,mf->blf", x_BLM, weight, self.layout)
        h_BLF = constrain(self.layout, "dense_hidden", h_BLF)
        return (
            h_BLF
            if bias is None
            else h_BLF + broadcast(used(bias, self.layout, h_BLF.dtype), h_BLF)
        )
