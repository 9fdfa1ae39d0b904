"""A decoder-only Transformer of attention, dense and MoE blocks.

Blocks that repeat with the card's period `every` are stacked on one leading dim and run by a scan,
or unrolled, as the sharding card says: the parameters, and so the checkpoints, are the same for
both. Blocks before the first whole period and after the last one stand alone.

B sequences, L tokens, M model width, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from gshard_moe import config as configs
from gshard_moe import dispatch
from gshard_moe.layout import Layout
from gshard_moe.nn.attention import Attention, Cache
from gshard_moe.nn.dense import DenseFFN
from gshard_moe.nn.moe import MoE, MoEMetrics
from gshard_moe.nn.norm import Norm
from gshard_moe.nn.parameter import constrain, linear, matrix, used

# What limits an expert's slots: the card's two factors, or nothing (sampling).
Capacity = Literal["train", "eval", "dropless"]


class TransformerOutput(NamedTuple):
    """The logits, float32, and what the layers did.

    Attributes:
      logits_BLV: of the next token.
      metrics: of the MoE layers, stacked on a leading dim; None for a dense model.
      cache: with the new tokens in it; None if none was given.
    """

    logits_BLV: Float[Array, "B L V"]
    metrics: MoEMetrics | None
    cache: Cache | None


class BlockInputs(NamedTuple):
    """What every block is given beside its tokens."""

    position_L: jax.Array
    token_ids_BL: jax.Array
    mask_BL: jax.Array | None
    key: jax.Array | None
    capacity: Capacity


class _Carried(NamedTuple):
    """What a block hands on beside its tokens."""

    metrics: MoEMetrics | None
    cache: Cache | None


class Block(nnx.Module):
    """Attention and a feed-forward network, dense or MoE, each after a norm, with residuals."""

    def __init__(
        self,
        config: configs.ModelConfig,
        moe: configs.MoEConfig | None,
        *,
        layout: Layout | None,
        rngs: nnx.Rngs,
    ):
        """Initialises the weights; `moe` None makes the block dense."""
        self.attention_norm = Norm(config, layout=layout)
        self.attention = Attention(config, layout=layout, rngs=rngs)
        self.ffn_norm = Norm(config, layout=layout)
        self.moe = None if moe is None else MoE(moe, layout=layout, rngs=rngs)
        self.dense = DenseFFN(config, layout=layout, rngs=rngs) if moe is None else None

    def __call__(
        self,
        x_BLM: Float[Array, "B L M"],
        cache: Cache | None,
        inputs: "BlockInputs",
        index: Int[Array, ""] | int,
    ) -> tuple[Float[Array, "B L M"], MoEMetrics | None, Cache | None]:
        """Returns the tokens, the metrics if the block is MoE, and the cache if there is one."""
        with jax.named_scope("attention"):
            mixed_BLM, cache = self.attention(self.attention_norm(x_BLM), inputs.position_L, cache)
            x_BLM = x_BLM + mixed_BLM
        normed_BLM = self.ffn_norm(x_BLM)
        if self.moe is None:
            assert self.dense is not None
            with jax.named_scope("dense"):
                return x_BLM + self.dense(normed_BLM), None, cache
        config = self.moe.config
        if inputs.capacity == "dropless":
            config = config.dropless(group_size=x_BLM.shape[1])
        y_BLM, metrics = self.moe(
            normed_BLM,
            mask_BL=inputs.mask_BL,
            key=None if inputs.key is None else jax.random.fold_in(inputs.key, index),
            token_ids_BL=inputs.token_ids_BL,
            train=inputs.capacity == "train",
            config=config,
        )
        return x_BLM + y_BLM, metrics, cache


class Period(nnx.Module):
    """The blocks of one period of the stack: the last is MoE, those before it are dense."""

    def __init__(
        self, config: configs.ModelConfig, first: int, *, layout: Layout | None, rngs: nnx.Rngs
    ):
        """Makes the blocks from index `first` on."""
        self.num_blocks = _period(config)
        for i in range(self.num_blocks):
            moe = config.moe if config.is_moe_block(first + i) else None
            setattr(self, f"block_{i}", Block(config, moe, layout=layout, rngs=rngs))

    @property
    def blocks(self) -> list[Block]:
        """The blocks in order."""
        return [getattr(self, f"block_{i}") for i in range(self.num_blocks)]


class Transformer(nnx.Module):
    """A causal language model.

    Attributes:
      config: what is computed.
      layout: where; None leaves it to XLA.
      compute: scan or unroll, and remat: the layout's, or the defaults.
    """

    def __init__(
        self, config: configs.ModelConfig, *, layout: Layout | None = None, rngs: nnx.Rngs
    ):
        """Initialises float32 weights; the stream `params` is used."""
        self.config = config
        self.layout = layout
        self.compute = configs.ComputeConfig() if layout is None else layout.config.compute
        self.stack = stack_of(config)
        V, M, W = config.vocab_size, config.model_dim, config.max_positions
        self.embed = matrix(rngs, (V, M), "embed", inputs=(-1,))
        learned = config.positions == "learned"
        self.positions = matrix(rngs, (W, M), "positions", inputs=(-1,)) if learned else None
        for i in self.stack.alone:
            moe = config.moe if config.is_moe_block(i) else None
            setattr(self, f"block_{i}", Block(config, moe, layout=layout, rngs=rngs))
        if self.stack.periods:

            @nnx.vmap(in_axes=0, out_axes=0)
            def periods(key: jax.Array) -> Period:
                return Period(config, self.stack.first, layout=layout, rngs=nnx.Rngs(params=key))

            self.periods = periods(jax.random.split(rngs.params(), self.stack.periods))
        self.norm = Norm(config, layout=layout)
        self.head = None if config.tied_embeddings else matrix(rngs, (M, V), "head")

    def __call__(
        self,
        token_ids_BL: Int[Array, "B L"],
        *,
        mask_BL: Bool[Array, "B L"] | None = None,
        key: Key[Array, ""] | None = None,
        capacity: Capacity = "eval",
        cache: Cache | None = None,
        start: Int[Array, ""] | int = 0,
    ) -> TransformerOutput:
        """Returns the logits of the token after each.

        Args:
          token_ids_BL: 0 to V-1.
          mask_BL: False for padding, which takes no expert's slot; it must come after the tokens.
          key: of the step, needed in training where the experts' card is random; each block folds
            its number in.
          capacity: of the experts: the card's for training or evaluation, or dropless, where every
            token gets its K experts and the result does not depend on the others.
          cache: of `init_cache`; the new tokens are written at `start`.
          start: the position of the first token.
        Raises:
          ValueError: if B * L does not divide by the group size (but for `dropless`).
        """
        lay = functools.partial(constrain, self.layout)
        dtype = jnp.dtype(self.config.train.dtype)
        position_L = jnp.arange(token_ids_BL.shape[1]) + start
        with jax.named_scope("embed"):
            embed_VM = used(self.embed, self.layout, dtype)
            x_BLM = lay("tokens", embed_VM[lay("token_ids", token_ids_BL)])
            if self.positions is not None:
                positions_WM = used(self.positions, self.layout, dtype)
                x_BLM = x_BLM + positions_WM[position_L][None]
        inputs = BlockInputs(position_L, token_ids_BL, mask_BL, key, capacity)
        x_BLM, metrics, cache = self._blocks(x_BLM, inputs, cache)
        with jax.named_scope("head"):
            x_BLM = self.norm(x_BLM)
            if self.head is None:
                logits_BLV = linear("blm,vm->blv", x_BLM, self.embed, self.layout, jnp.float32)
            else:
                logits_BLV = linear("blm,mv->blv", x_BLM, self.head, self.layout, jnp.float32)
            return TransformerOutput(lay("logits", logits_BLV), metrics, cache)

    def init_cache(self, batch_size: int, length: int) -> Cache:
        """Returns an empty cache for `length` positions, in the computation's dtype."""
        config = self.config
        shape = (config.num_layers, batch_size, length, config.num_kv_heads, config.head_dim)
        zeros = constrain(self.layout, "cache", jnp.zeros(shape, config.train.dtype))
        return Cache(zeros, zeros)

    def _blocks(
        self,
        x_BLM: jax.Array,
        inputs: BlockInputs,
        cache: Cache | None,
    ) -> tuple[jax.Array, MoEMetrics | None, Cache | None]:
        """Runs all blocks: those before the periods, the periods, those after."""
        first, count, size = self.stack.first, self.stack.periods, _period(self.config)
        end = first + count * size
        remat = _remat(self.compute.remat)
        carried = []

        def run(blocks: list[Block], x: jax.Array, kept: Cache | None, index: Any) -> tuple:
            """Runs consecutive blocks, from block `index` on, with their caches stacked."""
            done = []
            for i, block in enumerate(blocks):
                mine = jax.tree.map(lambda leaf, i=i: leaf[i], kept)
                x, metrics, mine = block(x, mine, inputs, index + i)
                done.append(_Carried(metrics, mine))
            return x, _Carried(*(_stacked([d[i] for d in done]) for i in range(2)))

        def alone(indices: range, x: jax.Array) -> jax.Array:
            for i in indices:
                graph, state = nnx.split(getattr(self, f"block_{i}"))
                kept = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], cache)
                with jax.named_scope(f"layer_{i}"):
                    x, out = remat(lambda x, s, k, g=graph, i=i: run([nnx.merge(g, s)], x, k, i))(
                        x, state, kept
                    )
                carried.append(out)
            return x

        x_BLM = alone(range(first), x_BLM)
        if count:
            graph, state = nnx.split(self.periods)

            def body(x: jax.Array, xs: tuple) -> tuple:
                return run(nnx.merge(graph, xs[0]).blocks, x, *xs[1:])

            kept = jax.tree.map(
                lambda leaf: leaf[first:end].reshape(count, size, *leaf.shape[1:]), cache
            )
            index = first + size * jnp.arange(count)
            x_BLM, out = self._repeat(remat(body), x_BLM, (state, kept, index))
            carried.append(jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), out))
        x_BLM = alone(range(end, self.config.num_layers), x_BLM)
        metrics, cache = (_joined([c[i] for c in carried]) for i in range(2))
        return x_BLM, metrics, cache

    def _repeat(self, body: Callable, x: jax.Array, xs: Any) -> tuple[jax.Array, Any]:
        """Applies `body` to each slice of `xs` in turn, by a scan or unrolled."""
        if self.compute.layers == "scan":
            with jax.named_scope("layers"):
                return jax.lax.scan(body, x, xs, unroll=self.compute.unroll)
        # A split, unlike slices, has a gradient that is one concatenation.
        leaves, tree = jax.tree.flatten(xs)
        parts = [jnp.unstack(leaf) for leaf in leaves]
        outs = []
        for i in range(self.stack.periods):
            with jax.named_scope(f"layer_{self.stack.first + i * _period(self.config)}"):
                x, out = body(x, tree.unflatten([part[i] for part in parts]))
            outs.append(out)
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outs)


class Stack(NamedTuple):
    """How blocks are stacked: `periods` whole ones from block `first` on, and `alone` the rest."""

    first: int
    periods: int
    alone: tuple[int, ...]


def _period(config: configs.ModelConfig) -> int:
    return 1 if config.moe is None else config.moe.every


def stack_of(config: configs.ModelConfig) -> Stack:
    """Returns how a model's blocks are stacked."""
    size = _period(config)
    first_dense = 0 if config.moe is None else config.moe.first_dense
    first = min(-(-first_dense // size) * size, config.num_layers)
    periods = (config.num_layers - first) // size
    alone = (*range(first), *range(first + periods * size, config.num_layers))
    return Stack(first, periods, alone)


def _remat(name: configs.Remat) -> Callable[[Callable], Callable]:
    """Returns the transform that recomputes, in the backward, what the policy does not save."""
    if name == "none":
        return lambda f: f
    if name == "full":
        # But for the integers that say who goes where: the gradients of the tokens can then travel
        # while the block is computed again.
        policy = jax.checkpoint_policies.save_only_these_names(dispatch.KEPT)
        return functools.partial(jax.checkpoint, policy=policy)
    return functools.partial(jax.checkpoint, policy=getattr(jax.checkpoint_policies, name))


def _stacked(items: list[Any]) -> Any:
    """Stacks those of the items that are there; None if none is."""
    there = [item for item in items if item is not None]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *there) if there else None


def _joined(items: list[Any]) -> Any:
    """Concatenates those of the items that are there; None if none is."""
    there = [item for item in items if item is not None]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *there) if there else None
