"""The collectives that a layout implies for one training step, without compiling anything.

They follow from the specs by GShard's rules (`layout.traffic`). Scalars, per-expert counts and the
softmax's row sums are left out. What XLA does beside or instead can only be read from the compiled
program.
"""

from typing import NamedTuple

from gshard_moe import config as configs
from gshard_moe import exchange
from gshard_moe.exchange import choose
from gshard_moe.exchange.choose import Choice
from gshard_moe.exchange.sizes import Sizes
from gshard_moe.layout import Layout, letter_sizes
from gshard_moe.layout.notation import ACTIVATIONS, PARAMETERS
from gshard_moe.layout.traffic import Collective, held_bytes, one, times, total
from gshard_moe.nn import moe_weights
from gshard_moe.train import inventory

# Used in float32, whatever the computation's dtype.
_FLOAT32 = ("router", "head_norm", "vector")
# The dim that a parameter's gradient sums over, and the activation that has it. An expert's is of
# slots or rows; of all others it is the batch.
_SUMMED_OVER = {"router": ("groups", "G")}


def collectives(model: configs.ModelConfig, layout: Layout) -> list[Collective]:
    """Returns what one device sends in a step, by kind, mesh axes and role.

    Args:
      model: the model card.
      layout: on a mesh, abstract or not.
    """
    sizes = letter_sizes(model)
    itemsize = _itemsize(model)
    passes = []
    masters = []
    for _, role, shape in inventory.parameters(model):
        of_weight = _parameter(layout, role, shape, 4 if role in _FLOAT32 else itemsize)
        if role.startswith("expert_"):
            of_weight = exchange.of_weight(layout, of_weight, sizes)
        passes += of_weight
        masters += _from_masters(layout, role, shape)
    if model.tied_embeddings:
        passes += _parameter(layout, "head", (model.model_dim, model.vocab_size), itemsize)
    recomputed = layout.config.compute.computes_again
    for i in range(model.num_layers):
        again = (recomputed, recomputed and _others_follow(model, i))
        moe = model.is_moe_block(i)
        passes += _tensor_parallel(model, layout, sizes, itemsize, moe=moe, again=again)
        if model.moe is not None and moe:
            passes += exchange.collectives(
                layout,
                {role: _shape(role, sizes) for role in ("groups", "slots", "rows")}
                | {"choices": _choices(model.moe, sizes)},
                itemsize,
                config=model.moe,
                weights=expert_weights(model.moe),
                recomputed=recomputed,
            )
    tokens = _held(layout, "tokens", sizes, itemsize)
    for role in ("embed", "head"):
        passes += one(layout, "all-reduce", layout.axes_of(role, "V", "used"), tokens, role)
    return total(masters + times(passes, model.train.accumulate))


class Fetch(NamedTuple):
    """How many devices share weights, in layers that are alike.

    Attributes:
      layers: their numbers.
      choice: what each fetch sends, in a step of one micro-batch, and which it is.
    """

    layers: tuple[int, ...]
    choice: Choice


def fetches(model: configs.ModelConfig, layout: Layout) -> list[Fetch]:
    """Returns the fetch of the MoE layers: they are alike, so it is one for all of them.

    Empty where the card's exchange is not `all_to_all`.
    """
    moe = model.moe
    if moe is None or layout.config.exchange.tokens != "all_to_all":
        return []
    sizes = letter_sizes(model)
    exchanged = Sizes(
        _shape("slots", sizes),
        _choices(moe, sizes),
        expert_weights(moe),
        _itemsize(model),
        dropout=moe.expert_dropout > 0,
        recomputed=layout.config.compute.computes_again,
    )
    layers = tuple(i for i in range(model.num_layers) if model.is_moe_block(i))
    return [Fetch(layers, choose.choose(layout, exchanged))] if layers else []


def expert_weights(moe: configs.MoEConfig) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Returns role and shape of each tensor of a layer's expert weights."""
    specs = moe_weights.specs(moe).values()
    return tuple((one.role, one.shape) for one in specs if one.role.startswith("expert_"))


def _parameter(
    layout: Layout, role: str, shape: tuple[int, ...], itemsize: int
) -> list[Collective]:
    """Returns the gathers of a parameter where it is used, and the sum of its gradient."""
    stacked = shape[0] if len(shape) > len(PARAMETERS[role].split()) else 1
    shape = shape[-len(PARAMETERS[role].split()) :]
    stored = {axis for dim in layout.dims(role) for axis in dim.axes}
    used = {axis for dim in layout.dims(role, "used") for axis in dim.axes}
    held = held_bytes(layout, role, shape, itemsize, "used")
    gathers = one(layout, "all-gather", stored - used, held, role)
    # Gathered matrices are not kept for the backward, but gathered again; tables and vectors are
    # not needed there.
    looked_up = role in ("embed", "positions") or len(shape) == 1 or role.endswith("_bias")
    gathers = times(gathers, 1 if looked_up else 2)
    summed_over = _SUMMED_OVER.get(role, ("tokens", "B"))
    if role.startswith("expert_"):
        ragged = layout.config.compute.dispatch == "ragged"
        summed_over = ("rows", "R") if ragged else ("slots", "G")
    over = set(layout.axes_of(*summed_over))
    if role == "head_norm":
        over |= set(layout.axes_of("queries", "N"))
    over -= used
    # Scattered first, so that only the part that is kept is summed over the other axes.
    part = held_bytes(layout, role, shape, itemsize)
    reductions = one(layout, "reduce-scatter", over & (stored - used), held, role)
    reductions += one(layout, "all-reduce", over - stored, part, role)
    return times(gathers + reductions, stacked)


def _from_masters(layout: Layout, role: str, shape: tuple[int, ...]) -> list[Collective]:
    """Returns the gather of a float32 master weight that the optimiser keeps split (ZeRO-1)."""
    stored = {axis for dim in layout.dims(role) for axis in dim.axes}
    kept = {axis for dim in layout.dims(role, "optimizer") for axis in dim.axes}
    held = held_bytes(layout, role, shape, 4)
    return one(layout, "all-gather", kept - stored, held, role)


def _tensor_parallel(
    model: configs.ModelConfig,
    layout: Layout,
    sizes: dict[str, int],
    itemsize: int,
    *,
    moe: bool,
    again: tuple[bool, bool],
) -> list[Collective]:
    """Returns the sums after a block's attention and dense FFN, and of their inputs' gradients.

    `again` says whether the backward needs the sum after attention once more, and that after the
    dense FFN.
    """
    tokens = _held(layout, "tokens", sizes, itemsize)

    def sums(role: str, letter: str, count: int) -> list[Collective]:
        axes = layout.axes_of(role, letter, "used")
        return times(one(layout, "all-reduce", axes, tokens, role), count)

    found = (
        sums("attention_out", "N", 1 + again[0]) + sums("query", "N", 1) + sums("key_value", "J", 2)
    )
    if moe and model.moe is not None and model.moe.shared_hidden_dim:
        found += sums("shared_out", "U", 1 + again[1])
        found += sums("shared_in", "U", 2 if model.moe.gated else 1)
    if not moe:
        found += sums("dense_out", "F", 1 + again[1])
        found += sums("dense_in", "F", 2 if model.activation == "swiglu" else 1)
    return found


def _others_follow(model: configs.ModelConfig, index: int) -> bool:
    """Whether blocks follow in the period that is recomputed with this one."""
    size = 1 if model.moe is None else model.moe.every
    first_dense = 0 if model.moe is None else model.moe.first_dense
    start = index // size * size
    whole = first_dense <= start and start + size <= model.num_layers
    return whole and index + 1 < start + size


def _itemsize(model: configs.ModelConfig) -> int:
    return 2 if model.train.dtype == "bfloat16" else 4


def _held(layout: Layout, role: str, sizes: dict[str, int], itemsize: int) -> int:
    return held_bytes(layout, role, _shape(role, sizes), itemsize)


def _choices(moe: configs.MoEConfig, sizes: dict[str, int]) -> tuple[int, ...]:
    """Returns the shape of a routing: with rounds of rerouting, or of all experts' choices."""
    most = moe.num_experts if moe.router == "expert_choice" else moe.num_choices
    return (*_shape("choices", sizes)[:2], most)


def _shape(role: str, sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(sizes[letter] for letter in ACTIVATIONS[role].split())
