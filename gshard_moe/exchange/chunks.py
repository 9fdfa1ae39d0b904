"""Slots in chunks: while one chunk travels, the experts compute another.

Chunks are of experts where every device has enough of them, so that each weight is used once and
its gradient taken once; else of the capacity, where every chunk uses all weights, gathered once,
and a weight's gradient is a sum over the chunks.

E experts, G groups, C slots, M model width.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from gshard_moe.config import ChunkBy
from gshard_moe.experts import ROLES, ExpertWeights, Use
from gshard_moe.layout import sizes

_GATHERED = "gathered expert weights"


class Chunk(NamedTuple):
    """Some of the slots, with what their experts need.

    Attributes:
      xs_EGCM: the tokens in these slots.
      weights: of these experts.
      token_GEC: which token is in each of these slots.
      expert_E: the numbers of these experts.
    """

    xs_EGCM: Float[Array, "E G C M"]
    weights: ExpertWeights
    token_GEC: Int[Array, "G E C"]
    expert_E: Int[np.ndarray, " E"]


class Cut(NamedTuple):
    """Where slots are cut.

    Attributes:
      sizes: of the chunks: local experts, or slots of an expert.
      parts: by expert: into how many parts E is split; each gives every chunk as many. 0: by
        capacity.
    """

    sizes: tuple[int, ...]
    parts: int


def most(*, num_experts: int, capacity: int, parts: int, by: ChunkBy = "auto") -> int:
    """Returns how many chunks there can be; arguments as of `cut`."""
    local = num_experts // parts
    return {"auto": max(local, capacity), "expert": local, "capacity": capacity}[by]


def cut(chunks: int, *, num_experts: int, capacity: int, parts: int, by: ChunkBy = "auto") -> Cut:
    """Decides how slots are cut.

    Args:
      chunks: how many there are to be; they need not be equal.
      num_experts: E.
      capacity: C.
      parts: into how many parts E is split on the wire.
      by: `expert`, `capacity`, or by expert where there are as many.
    Raises:
      ValueError: if there are not as many of what is cut.
    """
    local = num_experts // parts
    if fault := sizes.chunk_fault(chunks, local, capacity, by):
        raise ValueError(fault)
    if by == "expert" or (by == "auto" and chunks <= local):
        return Cut(_sizes(local, chunks), parts)
    return Cut(_sizes(capacity, chunks), 0)


def split(
    xs_EGCM: Float[Array, "E G C M"],
    weights: ExpertWeights,
    token_GEC: Int[Array, "G E C"],
    where: Cut,
) -> list[Chunk]:
    """Cuts slots and weights; the order of `joined`."""
    num_experts = xs_EGCM.shape[0]
    expert_E = np.arange(num_experts)
    if len(where.sizes) == 1:
        return [Chunk(xs_EGCM, weights, token_GEC, expert_E)]
    if not where.parts:
        pieces = zip(_along(xs_EGCM, 2, where), _along(token_GEC, 2, where), strict=True)
        return [Chunk(xs, weights, token, expert_E) for xs, token in pieces]
    leaves, tree = jax.tree.flatten(weights)
    of_leaves = zip(*[_along(leaf, 0, where) for leaf in leaves], strict=True)
    numbers = np.split(expert_E.reshape(where.parts, -1), np.cumsum(where.sizes)[:-1], axis=1)
    return [
        Chunk(xs, tree.unflatten(own), token, number.reshape(-1))
        for xs, own, token, number in zip(
            _along(xs_EGCM, 0, where), of_leaves, _along(token_GEC, 1, where), numbers, strict=True
        )
    ]


def over_chunks(
    run: Callable[[Chunk], jax.Array],
    xs_EGCM: Float[Array, "E G C M"],
    weights: ExpertWeights,
    token_GEC: Int[Array, "G E C"],
    where: Cut,
    use: Use,
) -> list[jax.Array]:
    """Runs each chunk.

    Args:
      run: takes a chunk to its experts and back.
      xs_EGCM: the slots.
      weights: of all experts, as stored.
      token_GEC: which token is in each slot.
      where: they are cut.
      use: lays out a weight for its use.
    """
    if where.parts or len(where.sizes) == 1:
        return [run(chunk) for chunk in split(xs_EGCM, weights, token_GEC, where)]

    def gather(weight: jax.Array, role: str) -> jax.Array:
        weight = use(role, weight.astype(xs_EGCM.dtype))
        # In float32, so that the chunks' gradients of a weight are summed in float32.
        return checkpoint_name(weight.astype(jnp.float32), _GATHERED)

    def run_all(xs_EGCM: jax.Array, weights: ExpertWeights) -> list[jax.Array]:
        used = {name: gather(weight, ROLES[name]) for name, weight in weights.held().items()}
        pieces = split(xs_EGCM, weights._replace(**used), token_GEC, where)
        return [run(chunk) for chunk in pieces]

    # Not kept for the backward, which gathers them again: see `experts.linear`.
    policy = jax.checkpoint_policies.save_anything_except_these_names(_GATHERED)
    return jax.checkpoint(run_all, policy=policy)(xs_EGCM, weights)


def joined(ys_EGCM: Sequence[jax.Array], where: Cut) -> jax.Array:
    """Puts the chunks' slots together again."""
    if len(ys_EGCM) == 1:
        return ys_EGCM[0]
    if not where.parts:
        return jnp.concatenate(ys_EGCM, axis=2)
    local = [ys.reshape(where.parts, -1, *ys.shape[1:]) for ys in ys_EGCM]
    return jnp.concatenate(local, axis=1).reshape(-1, *ys_EGCM[0].shape[1:])


def _sizes(total: int, chunks: int) -> tuple[int, ...]:
    """Returns sizes as equal as can be, the larger ones first."""
    return tuple(len(piece) for piece in np.array_split(np.arange(total), chunks))


def _along(x: jax.Array, dim: int, where: Cut) -> list[jax.Array]:
    """Cuts a dim; where it is of experts, each part of it gives as many to every chunk."""
    if not where.parts:
        return list(jax.lax.split(x, where.sizes, axis=dim))
    before, after = x.shape[:dim], x.shape[dim + 1 :]
    parted = x.reshape(*before, where.parts, -1, *after)
    pieces = jax.lax.split(parted, where.sizes, axis=dim + 1)
    return [piece.reshape(*before, -1, *after) for piece in pieces]
