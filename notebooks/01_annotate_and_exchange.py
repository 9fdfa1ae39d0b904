# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # One model, four ways to bring tokens to experts
#
# The experts of an MoE layer live on different devices, so tokens and experts must meet. Tokens can
# travel: by annotations that XLA turns into collectives, or by an all-to-all that is written out.
# Experts can travel instead, round a ring; or some of both. In this library that is not a property
# of the model: **one sharding card is changed, and nothing else**. This notebook trains a small MoE
# Transformer each way on eight simulated devices, and checks that the losses are the same and that
# each program sends what its card implies.

# %%
import collections
import dataclasses
import os
import re

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # eight simulated devices, on any machine

import jax

jax.config.update("jax_num_cpu_devices", 8)

import numpy as np

from gshard_moe import Layout, load_model
from gshard_moe.train import state, step, traffic

# %% [markdown]
# ## The model, once
#
# A model card says what is computed: here one dense block, and one MoE block of eight experts of
# which each token takes two. `state.Model` is the Flax NNX module `gshard_moe.Transformer` apart
# from its weights, so that they can be drawn once and trained four times.

# %%
config = load_model("tiny")
train = dataclasses.replace(config.train, batch_size=8, steps=3, warmup_steps=1)
config = dataclasses.replace(config, num_layers=2, train=train)


def on_devices(card):
    layout = Layout.load(card)
    return state.Model(config, layout.on(layout.mesh()))


# %% [markdown]
# ## The card, four times
#
# A sharding card names the mesh axes, says role by role which dimension is split over which axis
# (`expert_in = "E/expert M/fsdp H"`), and in `[exchange]` how tokens and experts meet: `tokens` by
# annotations (`spmd`) or by hand, and `fetch`, how many devices share their experts' weights.

# %%
models = {card: on_devices(card) for card in ("spmd", "all_to_all", "janus", "hybrid")}

for card, model in models.items():
    layout = model.layout
    chosen = layout.config.exchange
    axes = ", ".join(f"{axis}={size}" for axis, size in layout.axis_sizes.items())
    print(f"{card:10} {axes}: tokens = {chosen.tokens}, fetch = {chosen.fetch}")

# %% [markdown]
# ## What each sends
#
# What a card implies is known before anything is compiled; `gshard-moe explain` prints it. Tokens
# go by all-to-all, experts by collective-permute: `janus` hands them on and sends no token;
# `hybrid` shares them in pairs, and sends tokens to the other pairs.

# %%
EXCHANGES = ("all-to-all", "collective-permute")


def said(model):
    counts = collections.Counter()
    for one in traffic.collectives(model.config, model.layout):
        if one.kind in EXCHANGES:
            print(f"  {one.count:3} {one.kind:18} over {one.link:6} {one.role:12} {one.bytes:9,} B")
            counts[one.kind] += one.count
    return counts


promised = {}
for card, model in models.items():
    print(card)
    promised[card] = said(model)

# %% [markdown]
# And this is what XLA made of one training step: forward, backward and AdamW.

# %%
inputs, targets = np.random.default_rng(0).integers(0, 64, (2, train.steps, 8, train.seq_len))


def compiled(model):
    tokens = jax.ShapeDtypeStruct(
        inputs.shape[1:], "int32", sharding=model.layout.sharding("token_ids")
    )
    return step.jit_train_step(model).lower(state.abstract_state(model), tokens, tokens).compile()


programs = {card: compiled(model) for card, model in models.items()}
counted = {}
for card, program in programs.items():
    found = re.findall(r" (all-to-all|collective-permute)\(", program.as_text())
    counted[card] = collections.Counter(found)
    both = "  ".join(f"{k}: {promised[card][k]} said, {counted[card][k]} made" for k in EXCHANGES)
    print(f"{card:10} {both}")

# %% [markdown]
# ## The same training
#
# The same first weights, the same tokens, three steps under each card.

# %%
weights = jax.tree.map(np.asarray, state.init_state(models["spmd"], seed=0))
losses = {}
for card, model in models.items():
    now = jax.device_put(weights, state.state_shardings(model))
    there = model.layout.sharding("token_ids")
    losses[card] = []
    for i in range(train.steps):
        batch = (jax.device_put(x[i].astype(np.int32), there) for x in (inputs, targets))
        now, metrics = programs[card](now, *batch)
        losses[card].append(float(metrics.loss))
    print(f"{card:10}", "  ".join(f"{loss:.6f}" for loss in losses[card]))

# %% [markdown]
# The function is the same: only the order of float32 sums differs. And each program holds the
# exchanges that its card implies, no others.

# %%
ANOTHER_ORDER_OF_SUMS = 1e-5

for card in models:
    np.testing.assert_allclose(losses[card], losses["spmd"], rtol=ANOTHER_ORDER_OF_SUMS)
    assert counted[card] == promised[card]
assert all(np.diff(losses["spmd"]) < 0)
assert not counted["janus"]["all-to-all"] and counted["janus"]["collective-permute"]
