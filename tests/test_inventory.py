"""The inventory says of every tensor what the training state is, and asks no device."""

import dataclasses
import math

import jax
import pytest

from gshard_moe import cards, config
from gshard_moe.layout import ACTIVATIONS, Layout, LayoutError
from gshard_moe.train import inventory
from gshard_moe.train.inventory import Tensor, Totals
from gshard_moe.train.state import Model, abstract_state


def _zero1() -> Layout:
    """The batch is split, weights are whole; masters and moments of one role are split."""
    card = cards.load_sharding("data")
    layout = dataclasses.replace(card.layout, optimizer={"expert_in": "E/data M H"})
    return Layout(dataclasses.replace(card, layout=layout)).on(8)


def _kept(layout: Layout, *, model: str = "tiny") -> list[Tensor]:
    tensors = inventory.tensors(cards.load_model(model), layout)
    return [tensor for tensor in tensors if tensor.kind != "activation"]


@pytest.mark.parametrize("model", cards.names("models"))
@pytest.mark.parametrize("make", [lambda: Layout.load("expert_fsdp").on(8), _zero1])
def test_it_is_the_training_state(model, make):
    """The same arrays, and the same part of each on a device, as the state that the step takes."""
    layout = make()
    state = abstract_state(Model(cards.load_model(model), layout))
    # Beside parameters and moments optax keeps counters.
    kept = state.params, state.biases, state.opt_state
    arrays = [leaf for leaf in jax.tree.leaves(kept) if leaf.ndim]
    expected = [(a.shape, a.dtype.name, a.sharding.shard_shape(a.shape)) for a in arrays]
    found = [(t.shape, t.dtype, t.shape_per_device) for t in _kept(layout, model=model)]
    assert sorted(found) == sorted(expected)


def test_a_parameter_by_hand():
    """2 periods of 8 experts, 128 x 192, on fsdp=2 x expert=4: 2 * 2 * 64 * 192 * 4 bytes."""
    tensors = _kept(Layout.load("expert_fsdp").on(8))
    found = [tensor for tensor in tensors if tensor.path.endswith("moe.expert_in")]
    path = "periods.block_1.moe.expert_in"
    parameter = Tensor(
        role="expert_in",
        path=path,
        shape=(2, 8, 128, 192),
        spec="- E/expert M/fsdp H",
        shape_per_device=(2, 2, 64, 192),
        dtype="float32",
        bytes_per_device=196608,
        kind="parameter",
    )
    moments = [parameter._replace(path=f"{m}.{path}", kind="moment") for m in ("mu", "nu")]
    assert found == [parameter, *moments]


def test_the_optimizers_layout_is_that_of_masters_and_moments():
    """The step begins with a copy in the stored layout, which lives within it."""
    tensors = inventory.tensors(cards.load_model("tiny"), _zero1())
    found = {t.path: (t.kind, t.spec, t.shape_per_device) for t in tensors if "expert_in" in t.path}
    path = "periods.block_1.moe.expert_in"
    split = ("- E/data M H", (2, 1, 128, 192))
    assert found == {
        path: ("parameter", *split),
        f"mu.{path}": ("moment", *split),
        f"nu.{path}": ("moment", *split),
        f"copy.{path}": ("activation", "- E M H", (2, 8, 128, 192)),
    }
    copies = [t.role for t in tensors if t.path.startswith("copy.")]
    assert copies == ["expert_in"] * 2  # the gate is one too


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_of_the_microbatch_in_the_computations_dtype(dtype):
    model = cards.load_model("tiny")
    train = dataclasses.replace(model.train, dtype=dtype, batch_size=32, accumulate=2)
    model = dataclasses.replace(model, train=train)
    tensors = inventory.tensors(model, Layout.load("expert_data").on(8))
    found = {t.role: t for t in tensors if t.kind == "activation"}
    assert set(ACTIVATIONS) - set(found) == {"shared_hidden"}
    for role in ("tokens", "groups", "slots", "mask", "dense_hidden", "cache"):
        assert found[role].dtype == dtype
    for role in ("logits", "router_logits"):
        assert found[role].dtype == "float32"
    for role in ("token_ids", "choices"):
        assert found[role].dtype == "int32"
    tokens = found["tokens"]
    assert (tokens.shape, tokens.shape_per_device) == ((16, 256, 128), (2, 256, 128))
    assert tokens.bytes_per_device == 2 * 256 * 128 * (4 if dtype == "float32" else 2)
    assert [t.spec for t in (found["slots_source"], found["slots_wire"])] == [
        "E G/data/expert C M",
        "E/expert G/data C M",
    ]


def test_a_dense_model_has_no_tensor_of_experts():
    model = dataclasses.replace(cards.load_model("tiny"), moe=None)
    tensors = inventory.tensors(model, Layout.load("data").on(8))
    letters = {word[0] for tensor in tensors for word in tensor.spec.split()}
    assert not letters & set("GSECKH")
    count = inventory.count_parameters(model)
    assert count.total == count.active == _num_elements(tensors)


def _num_elements(tensors: list[inventory.Tensor]) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensors if tensor.kind == "parameter")


def _by_hand(*, moe: bool) -> config.ModelConfig:
    model = cards.load_model("tiny")
    small = dict(vocab_size=11, model_dim=2, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=2)
    changed = dataclasses.replace(model, moe=None, dense_hidden_dim=7, qk_norm=False, **small)
    if not moe:
        return changed
    assert model.moe is not None
    experts = dataclasses.replace(
        model.moe, model_dim=2, hidden_dim=3, num_experts=4, top_k=1, every=1
    )
    return dataclasses.replace(changed, moe=experts)


def test_parameters_by_hand():
    # Embed and head 11 * 2, query and out 2 * 2 * 2, key and value 2 * 1 * 2, norms 3 * 2.
    rest = 22 + 22 + 8 + 4 + 4 + 8 + 6
    dense = inventory.count_parameters(_by_hand(moe=False))
    assert dense.total == dense.active == rest + 3 * 2 * 7
    # Router 2 * 4; an expert has 3 matrices of 2 * 3, and there are 4, of which a token meets 1.
    assert inventory.count_parameters(_by_hand(moe=True)) == (rest + 8 + 4 * 18, rest + 8 + 18)


def test_totals():
    tensors = inventory.tensors(cards.load_model("tiny"), Layout.load("expert_fsdp").on(8))
    parameters = [t for t in tensors if t.kind == "parameter"]
    held = sum(tensor.bytes_per_device for tensor in parameters)
    assert inventory.totals(tensors) == Totals(held, 2 * held)
    assert inventory.totals([]) == Totals(0, 0)


def test_a_model_that_does_not_fit_is_refused():
    with pytest.raises(LayoutError, match=r"got E=8 \(models/x.toml\), expert=16"):
        inventory.tensors(
            cards.load_model("tiny"), Layout.load("expert").on(16), source="models/x.toml"
        )
