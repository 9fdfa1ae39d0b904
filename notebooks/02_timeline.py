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
# # Is my communication hidden?
#
# An MoE layer sends every token to its experts and back: two all-to-alls forward, two backward. On
# a TPU each of them is synchronous unless the compiler is asked otherwise, and stays exposed unless
# it finds something to compute meanwhile. This notebook compiles Mixtral's MoE layer for eight TPU
# v5p chips **that are not here**, replays the schedules, and shows what four chunks change.

# %%
# %matplotlib inline
import dataclasses
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # compile for TPUs; run nothing on them

import jax

jax.config.update("jax_num_cpu_devices", 8)

from gshard_moe import Layout, aot, load_model
from gshard_moe.timeline import draw
from gshard_moe.train.study import study

aot.compile_only()

# %% [markdown]
# The model card says what is computed. The sharding card says how: here tokens and experts are both
# split over the one mesh axis `expert`, and `[exchange] chunks` cuts each expert's slots into
# pieces that travel while others are computed. The function is the same.

# %%
model = load_model("mixtral_8x7b")
model = dataclasses.replace(model, train=dataclasses.replace(model.train, batch_size=16))
cluster = aot.cluster("v5p:2x2x2")


def compiled(chunks):
    card = Layout.load("expert").config
    exchange = dataclasses.replace(card.exchange, chunks=chunks)
    return study("layer", model, Layout(dataclasses.replace(card, exchange=exchange)), cluster)


whole, chunked = compiled(1), compiled(4)

# %% [markdown]
# A collective is **hidden** while the core computes beside it, **exposed** while the core stands
# still for it. No order of the same operations is faster than the **lower bound**. Two models of
# the links are shown: `lhs` prices as XLA's scheduler does, `bisect` is the least that the links
# allow.

# %%
print(f"{'chunks':>6} {'links':>7} {'step':>9} {'bound':>9} {'exposed':>9} {'of':>9} {'hidden':>7}")
for chunks, found in ((1, whole), (4, chunked)):
    for links, report in found.reports.items():
        times = (report.step_s, report.lower_bound_s, report.exposed_s, report.comm_s)
        columns = " ".join(f"{1e3 * seconds:6.2f} ms" for seconds in times)
        print(f"{chunks:6} {links:>7} {columns} {report.hidden_share:6.0%}")

# %% [markdown]
# Where: each lane is a resource, red is the core standing still.

# %%
draw.figure({"one piece": whole.programs["lhs"], "four chunks": chunked.programs["lhs"]})

# %% [markdown]
# What hid it, by the model's own names:

# %%
for collective in chunked.reports["lhs"].collectives:
    if collective.kind == "all-to-all":
        by = ", ".join(f"{name} {1e6 * s:.0f} us" for name, s in collective.hidden_by.items())
        exposed = f"{1e6 * collective.exposed:.0f} of {1e6 * collective.seconds:.0f} us exposed"
        print(f"{collective.scope:10} {exposed:24} hidden by: {by or 'nothing'}")

# %% [markdown]
# The same bytes are sent, and less of them is waited for.

# %%
for links in ("lhs", "bisect"):
    before, after = whole.reports[links], chunked.reports[links]
    assert after.hidden_share >= 0.75 > before.hidden_share
    assert after.exposed_s < before.exposed_s / 2
    assert after.lower_bound_s <= after.step_s < before.step_s
sent = [sum(one.bytes for one in found.sent) for found in (whole, chunked)]
assert sent[0] == sent[1]
