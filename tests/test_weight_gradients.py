"""Weight gradients of bfloat16 tokens: summed in float32, over chunks and round the ring.

A sum of such gradients in bfloat16 would lose more with every piece (0.2 % of one, 0.7 % of 32).
"""

import collections
import functools
import re

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gshard_moe import Layout, MoE, moe

CONFIG = cases.moe_config(group_size=64)
# Slots of an expert, in chunks; tokens that travel; weights that do; both.
DEVICES, CHUNKS, FEW = 8, 10, 3
EXCHANGES = {
    "chunks": {"chunks": CHUNKS, "chunk_by": "capacity"},
    "ring": {"fetch": 8},
    "ring, two on their way": {"fetch": 8, "prefetch": 2},
    "short rings": {"fetch": 4},
    "short rings and chunks": {"fetch": 4, "chunks": FEW, "chunk_by": "capacity"},
}
# The pieces are summed in float32 and rounded once, as one piece is: only where a sum of another
# order falls on the other side of a rounding can they differ.
WORSE = 1 + 1e-4
# Of one expert's matrices.
MATRIX = r"\[1,(?:16,24|24,16)\]"


def layout(**changes) -> Layout:
    return cases.layout("expert", exchange={"tokens": "all_to_all"} | changes)


@functools.cache
def inputs():
    rng = np.random.default_rng(0)
    x_BLM, dy_BLM = rng.normal(size=(2, DEVICES * 8, 8, CONFIG.model_dim))
    weights = MoE(CONFIG, rngs=nnx.Rngs(0)).weights
    return weights, jnp.asarray(x_BLM, jnp.float32), jnp.asarray(dy_BLM, jnp.float32)


def gradients(weights, x_BLM, dy_BLM, laid_out: Layout | None):
    """Returns the gradients of the experts' weights."""

    def forward(experts):
        whole = weights._replace(experts=experts)
        return moe(whole, x_BLM, CONFIG, layout=laid_out, train=True).y_BLM

    y_BLM, back = jax.vjp(forward, weights.experts)
    return back(dy_BLM.astype(y_BLM.dtype))[0]


@functools.cache
def errors(exchange: str, dtype=jnp.bfloat16) -> list[float]:
    """Returns how far each matrix's gradient is from that of float32 tokens, relative to it."""
    weights, x_BLM, dy_BLM = inputs()
    compiled = jax.jit(gradients, static_argnums=3)
    changes = EXCHANGES.get(exchange, {})
    mine = compiled(weights, x_BLM.astype(dtype), dy_BLM, layout(**changes))
    truth = compiled(weights, x_BLM, dy_BLM, None)
    return [
        float(np.linalg.norm(np.asarray(one - whole)) / np.linalg.norm(np.asarray(whole)))
        for one, whole in zip(*map(jax.tree.leaves, (mine, truth)), strict=True)
    ]


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_no_worse_than_one_piece(exchange: str):
    for many, one in zip(errors(exchange), errors("one piece"), strict=True):
        assert 0 < many <= WORSE * one
        assert one < 0.02  # a bfloat16 has 8 bits


@functools.cache
def operations(exchange: str) -> collections.Counter[tuple[str, str]]:
    """Counts the program's operations whose results are of a matrix's shape, by dtype."""
    weights, x_BLM, dy_BLM = inputs()
    laid_out = layout(**EXCHANGES[exchange])
    run = functools.partial(gradients, laid_out=laid_out)
    program = str(jax.make_jaxpr(run)(weights, x_BLM.astype(jnp.bfloat16), dy_BLM))
    found = re.findall(rf":(\w+){MATRIX}\S* = (\w+)", program)
    return collections.Counter((dtype, name) for dtype, name in found)


def sums(exchange: str) -> dict[str, int]:
    """Counts sums by dtype, of whatever name."""
    found: collections.Counter[str] = collections.Counter()
    for (dtype, name), count in operations(exchange).items():
        if name in ("add", "add_any", "psum", "reduce_sum", "psum_scatter"):
            found[dtype] += count
    return dict(found)


def test_chunks_are_summed_in_float32():
    """The program's own words, as numbers on a CPU hardly tell; SwiGLU has three matrices."""
    assert sums("chunks") == {"f32": 3 * (CHUNKS - 1)}
    assert operations("chunks")["f32", "dot_general"] >= 3 * CHUNKS


def test_gradients_travel_and_are_summed_in_float32():
    """Round the ring in 8 hops, the last of them home, where they are rounded; weights in 7."""
    assert sums("ring") == {"f32": 3 * 7}
    sent = {key: count for key, count in operations("ring").items() if key[1] == "ppermute"}
    # The weights twice, forward and backward, and the sums' last hop.
    assert sent == {("f32", "ppermute"): 3 * 7, ("bf16", "ppermute"): 3 * (7 + 7 + 1)}


def test_a_ring_of_chunks_adds_both_in_float32():
    """Of 2 groups of 4 devices: 4 steps, each of some chunks."""
    assert sums("short rings and chunks") == {"f32": 3 * (4 * (FEW - 1) + 3)}
