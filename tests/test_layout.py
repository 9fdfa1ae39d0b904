"""Layouts: where a card's tensors are on a mesh of 8 devices, of none, or of the caller's."""

import dataclasses
import functools
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gshard_moe import cards, config, layout
from gshard_moe.layout import Layout, LayoutError

_AUTO, _EXPLICIT = AxisType.Auto, AxisType.Explicit
_SIZES, _AXES = (2, 4), ("fsdp", "expert")


def _card(
    *, roles: Any = None, compute: Any = None, mesh: Any = None, **tables: Any
) -> config.ShardingConfig:
    """The card with both a gathered and an expert axis, with some of it changed."""
    card = cards.load_sharding("expert_fsdp")
    changed = dataclasses.replace(
        card.layout, roles={**card.layout.roles, **(roles or {})}, **tables
    )
    return dataclasses.replace(card, layout=changed, mesh=mesh or card.mesh)


def _layout(mesh: Any = None, **changes: Any) -> Layout:
    return Layout(_card(**changes), source="mine.toml", mesh=mesh)


def _mesh(*kinds: AxisType, sizes: tuple[int, ...] = _SIZES, axes: tuple[str, ...] = _AXES) -> Mesh:
    return jax.make_mesh(sizes, axes, axis_types=kinds or (_AUTO,) * len(axes))


def _numbers(*shape: int) -> jax.Array:
    return jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)


_MESHES = {
    "card": lambda: _layout(),
    "bound": lambda: _layout(_mesh()),
    "abstract": lambda: _layout().on(8),
    "explicit": lambda: _layout(_mesh(_EXPLICIT, _EXPLICIT)),
}


@pytest.fixture(params=_MESHES.values(), ids=list(_MESHES))
def on_a_mesh(request: pytest.FixtureRequest) -> Layout:
    """The same layout of the same eight devices, said in four ways."""
    return request.param()


# Where things are.

_PLACES = [
    # role, stage, shape; spec and shape of a device by hand, on fsdp=2, expert=4.
    ("expert_in", "stored", (8, 6, 5), P("expert", "fsdp", None), (2, 3, 5)),
    ("expert_in", "used", (8, 6, 5), P("expert", None, None), (2, 6, 5)),
    ("expert_in", "optimizer", (8, 6, 5), P("expert", "fsdp", None), (2, 3, 5)),
    ("tokens", "stored", (16, 3, 5), P(("fsdp", "expert"), None, None), (2, 3, 5)),
    # No parameter: `gather` does not change it.
    ("tokens", "used", (16, 3, 5), P(("fsdp", "expert"), None, None), (2, 3, 5)),
    ("vector", "stored", (5,), P(None), (5,)),
    # One leading dim more: stacked layers, which are not split.
    ("expert_in", "stored", (7, 8, 6, 5), P(None, "expert", "fsdp", None), (7, 2, 3, 5)),
    ("expert_in", "used", (7, 8, 6, 5), P(None, "expert", None, None), (7, 2, 6, 5)),
    ("vector", "stored", (7, 5), P(None, None), (7, 5)),
]


@pytest.mark.parametrize(("role", "stage", "shape", "spec", "per_device"), _PLACES)
def test_where_a_tensor_is(on_a_mesh: Layout, role, stage, shape, spec, per_device):
    assert on_a_mesh.spec(role, stage, ndim=len(shape)) == spec
    sharding = on_a_mesh.sharding(role, stage, ndim=len(shape))
    assert sharding == NamedSharding(on_a_mesh.mesh(), spec)
    assert on_a_mesh.shape_per_device(role, shape, stage) == per_device
    for dtype in ("float32", jnp.bfloat16, np.int8):
        expected = np.prod(per_device) * jnp.dtype(dtype).itemsize
        assert on_a_mesh.bytes_per_device(role, shape, dtype, stage) == expected
    mesh = on_a_mesh.mesh()
    if isinstance(mesh, Mesh):
        x = jax.device_put(_numbers(*shape), sharding)
        assert {shard.data.shape for shard in x.addressable_shards} == {per_device}


def test_without_a_rank_the_spec_is_of_one_layer():
    assert _layout().spec("expert_in") == _layout().spec("expert_in", ndim=3)


def test_the_optimizer_may_have_a_layout_of_its_own():
    lay = _layout(_mesh(), optimizer={"router": "M/fsdp E/expert"}, gather=())
    assert lay.spec("router") == lay.spec("router", "used") == P(None, None)
    assert lay.spec("router", "optimizer", ndim=3) == P(None, "fsdp", "expert")
    assert lay.spec("query", "optimizer") == lay.spec("query")
    assert lay.shape_per_device("router", (6, 8)) == (6, 8)
    assert lay.shape_per_device("router", (6, 8), "optimizer") == (3, 2)
    assert lay.bytes_per_device("router", (6, 8), "float32", "optimizer") == 24


def test_a_users_own_tensors():
    lay = _layout(_mesh(), user={"my cache": "B/fsdp L L N/expert", "gather": "Z"})
    assert lay.spec("my cache") == P("fsdp", None, None, "expert")
    assert lay.spec("my cache", "used") == lay.spec("my cache", "optimizer") == lay.spec("my cache")
    assert lay.shape_per_device("my cache", (4, 3, 3, 8)) == (2, 3, 3, 2)
    assert lay.spec("gather") == P(None)
    x = lay.constrain("my cache", _numbers(4, 3, 3, 8))
    assert x.sharding.spec == P("fsdp", None, None, "expert")


def test_axes_of_a_dim():
    lay = _layout()
    assert lay.axes_of("tokens", "B") == ("fsdp", "expert")
    assert lay.axes_of("tokens", "M") == ()
    assert (lay.axes_of("query", "M"), lay.axes_of("query", "M", "used")) == (("fsdp",), ())
    with pytest.raises(LayoutError, match=r"layout.tokens: a dim must be one of B L M; got 'E'"):
        lay.axes_of("tokens", "E")


@pytest.mark.parametrize("name", cards.names("shardings"))
def test_every_card_lays_out_every_role(name: str):
    lay = Layout.load(name)
    for role, letters in layout.ROLES.items():
        assert [dim.letter for dim in lay.dims(role)] == letters.split()


# Meshes.


def test_the_cards_mesh_is_all_auto_on_all_devices():
    lay = Layout.load("expert_fsdp")
    assert dict(lay.mesh().shape) == lay.axis_sizes == {"fsdp": 2, "expert": 4}
    assert lay.mesh().axis_types == (_AUTO, _AUTO)
    assert set(lay.mesh().devices.flat) == set(jax.devices())
    assert lay.mesh() is lay.mesh()
    assert dict(lay.mesh(jax.devices()[:4]).shape) == {"fsdp": 1, "expert": 4}


def test_an_abstract_mesh_needs_no_devices():
    lay = Layout.load("expert_fsdp").on(2048)
    assert lay.mesh() == AbstractMesh((512, 4), _AXES, axis_types=(_AUTO, _AUTO))
    assert lay.axis_sizes == {"fsdp": 512, "expert": 4}
    assert lay.on(8).axis_sizes == {"fsdp": 2, "expert": 4}


@pytest.mark.parametrize(
    ("mesh", "sizes"),
    [
        ("expert=2", {"fsdp": 4, "expert": 2}),
        (" fsdp = 8 , expert=1", {"fsdp": 8, "expert": 1}),
        ("expert=-1,fsdp=4", {"fsdp": 4, "expert": 2}),
        ({"expert": 8}, {"fsdp": 1, "expert": 8}),
        ({}, {"fsdp": 2, "expert": 4}),
        (AbstractMesh((3, 5), _AXES), {"fsdp": 3, "expert": 5}),
    ],
)
def test_other_sizes_for_the_mesh(mesh: Any, sizes: dict[str, int]):
    assert Layout.load("expert_fsdp", mesh=mesh).axis_sizes == sizes


def test_a_mesh_of_the_callers():
    # In any order, with an axis of one device that the card does not know.
    mesh = _mesh(sizes=(4, 1, 2), axes=("expert", "mine", "fsdp"))
    lay = Layout.load("expert_fsdp", mesh=mesh)
    assert lay.mesh() is mesh is lay.on(mesh).mesh()
    assert lay.constrain("router", _numbers(8, 8)).sharding.mesh == mesh


def _refused(message: str) -> Any:
    return pytest.raises(LayoutError, match=message)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("", r"^mesh: must be like fsdp=4,expert=2; got '' in ''"),
        ("fsdp", r"must be like .*; got 'fsdp'"),
        ("fsdp=4,", r"must be like .*; got '' in 'fsdp=4,'"),
        ("=4", r"must be like .*; got '=4'"),
        ("fsdp=4.0", r"must be like .*; got 'fsdp=4.0'"),
        ("fsdp=1_0", r"must be like .*; got 'fsdp=1_0'"),
        ("fsdp=４", r"must be like .*; got 'fsdp=４'"),
        (f"fsdp={'9' * 5000}", r"must be like "),
        ("fsdp=2,fsdp=4", r"^mesh: an axis must be given once; got 'fsdp'"),
        ("data=2", r"mesh.axes: an axis must be one of \['fsdp', 'expert'\]; got data=2"),
        ({"data": 2}, r"mesh.axes: an axis must be one of .*; got data=2"),
        ("fsdp=0", r"mesh.shape: a size must be positive or -1; got shape=\[0, 4\]"),
        ("fsdp=-2", r"mesh.shape: a size must be positive or -1; got shape=\[-2, 4\]"),
        ("expert=-1", r"mesh.shape: at most one size may be -1 .*; got shape=\[-1, -1\]"),
    ],
)
def test_sizes_that_are_none(mesh: Any, message: str):
    with _refused(message):
        Layout.load("expert_fsdp", mesh=mesh)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ("fsdp=4,expert=4", r"not need more devices.*fsdp=4, expert=4 \(16 devices\), devices=8"),
        ("fsdp=1,expert=2", r"not leave devices unused \(6 are\).*\(2 devices\), devices=8"),
        ("expert=3", r"must divide by the fixed sizes; .*expert=3 \(3 devices\), devices=8"),
    ],
)
def test_sizes_that_do_not_fill_the_devices(sizes: str, message: str):
    lay = Layout.load("expert_fsdp", mesh=sizes)
    for use in (lay.mesh, lambda: lay.on(8), lambda: lay.sharding("tokens")):
        with _refused(f"^shardings/expert_fsdp.toml: mesh.shape: .*{message}; give other sizes"):
            use()


@pytest.mark.parametrize("abstract", [False, True])
def test_a_foreign_mesh_is_refused(abstract: bool):
    def make(sizes: Any, axes: Any, kinds: Any) -> Any:
        if abstract:
            return AbstractMesh(sizes, axes, axis_types=kinds)
        return jax.make_mesh(sizes, axes, axis_types=kinds)

    cases = [
        (make((8,), ("expert",), (_AUTO,)), r"the card's axes .*; got expert=8;"),
        (
            make((2, 2, 2), ("fsdp", "expert", "data"), (_AUTO,) * 3),
            r"no other of more than one device; got fsdp=2, expert=2, data=2",
        ),
        (
            make(_SIZES, _AXES, (_AUTO, _EXPLICIT)),
            r"must be all Auto or all Explicit; got fsdp=Auto, expert=Explicit; use jax.make_mesh",
        ),
    ]
    x = _numbers(8, 2, 2)
    for mesh, message in cases:
        with _refused(message):
            Layout.load("expert_fsdp", mesh=mesh)
        with _refused(message):
            Layout.load("expert_fsdp").on(mesh)
        with jax.sharding.use_abstract_mesh(mesh if abstract else mesh.abstract_mesh):
            with _refused(message):
                Layout.load("expert_fsdp").constrain("tokens", x)


# The notation.

_NOTATION = [
    ({"tokens": ""}, r'layout.tokens: letters must be "B L M", in this order; got ""'),
    ({"tokens": "B L"}, r'layout.tokens: letters must be "B L M", in this order; got "B L"'),
    ({"tokens": "B M L"}, r'letters must be "B L M", in this order; got "B M L"'),
    ({"tokens": "B L M M"}, r'letters must be "B L M"'),
    ({"tokens": "b/fsdp L M"}, r'a dim must be like E or "E/expert/data"; got "b/fsdp" in "b/'),
    ({"tokens": "B/ L M"}, r'a dim must be like .*; got "B/" in "B/ L M"'),
    ({"tokens": "B//fsdp L M"}, r'a dim must be like .*; got "B//fsdp"'),
    ({"tokens": "/fsdp L M"}, r'a dim must be like .*; got "/fsdp"'),
    ({"tokens": "BL M"}, r'a dim must be like .*; got "BL" in "BL M"'),
    ({"tokens": "B\tL M"}, r'a dim must be like .*; got "B\\tL"'),
    ({"tokens": "B\nL M"}, r'a dim must be like .*; got "B\\nL"'),
    ({"tokens": "B L\u00a0M"}, r'a dim must be like .*; got "L\u00a0M"'),
    ({"tokens": "B,L,M"}, r'a dim must be like .*; got "B,L,M"'),
    ({"tokens": "B/fsdp L/fsdp M"}, r"an axis must be used once .* 'fsdp' 2 times in \"B/fsdp L"),
    ({"tokens": "B/fsdp/fsdp L M"}, r"an axis must be used once .* 'fsdp' 2 times"),
    ({"tokens": "B/data L M"}, r"axis 'data' must be one of the mesh's \['fsdp', 'expert'\]; got "),
    ({"tokens": "B/FSDP L M"}, r"axis 'FSDP' must be one of"),
    ({"tokens": "B/données L M"}, r"axis 'données' must be one of"),
    ({"token": "B L M"}, r"layout.token: is an unknown role; a tensor of your own belongs in "),
    ({"to ken": "B"}, r'layout."to ken": is an unknown role'),
]


@pytest.mark.parametrize(("roles", "message"), _NOTATION)
def test_a_layout_that_says_nothing(roles: dict[str, str], message: str):
    with _refused(f"^mine.toml: (?:layout.tokens: )?{message}") as error:
        _layout(roles=roles)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"gather": ("data",)}, r"layout.gather: 'data' must be one of the mesh's \['fsdp', "),
        ({"optimizer": {"tokens": "B L M"}}, r"layout.optimizer.tokens: must be the role of a par"),
        ({"optimizer": {"router": "E M"}}, r'layout.optimizer.router: letters must be "M E", in'),
        ({"optimizer": {"router": "M/x E"}}, r"layout.optimizer.router: axis 'x' must be one of"),
        ({"user": {"tokens": "B"}}, r"layout.user.tokens: must not be the name of a role; rename"),
        ({"user": {"mine": ""}}, r'layout.user.mine: must name a dim or more; got ""'),
        ({"user": {"mine": "b"}}, r'layout.user.mine: a dim must be like .*; got "b" in "b"'),
        ({"user": {"mine": "B/x"}}, r"layout.user.mine: axis 'x' must be one of the mesh's"),
    ],
)
def test_other_tables_are_read_as_strictly(tables: dict[str, Any], message: str):
    with _refused(f"^mine.toml: {message}"):
        _layout(**tables)


def test_a_missing_role_is_never_replicated_in_silence():
    card = cards.load_sharding("data")
    roles = dict(card.layout.roles)
    del roles["tokens"], roles["embed"]
    with pytest.raises(LayoutError) as error:
        Layout(dataclasses.replace(card, layout=config.LayoutConfig(roles=roles)))
    assert str(error.value).splitlines() == [
        'sharding: layout.embed: is missing; add embed = "V M"',
        'sharding: layout.tokens: is missing; add tokens = "B L M"',
    ]


def test_an_axis_that_is_gathered_twice():
    with _refused("layout.gather: an axis must be named once; got 'fsdp' twice"):
        _layout(gather=("fsdp", "fsdp"))


def test_roles_ranks_and_stages_that_are_not():
    lay = _layout()
    with _refused(r"a role must be known; got 'token'; the roles are embed, .*rows_hidden"):
        lay.spec("token")
    for ndim in (0, 2, 5):
        with _refused(rf"layout.tokens: .* the dims B L M .*; got ndim={ndim}"):
            lay.spec("tokens", ndim=ndim)
    with pytest.raises(Exception, match="stage"):
        lay.spec("tokens", "kept")  # pyright: ignore[reportArgumentType]


# Dims that do not divide.


def test_a_dim_that_its_axes_do_not_divide():
    lay = _layout(_mesh())
    message = (
        r"layout.expert_in: E must divide by its mesh axes; got E=6, expert=4; use num_experts"
    )
    for use in (
        lambda: lay.shape_per_device("expert_in", (6, 2, 2)),
        lambda: lay.bytes_per_device("expert_in", (6, 2, 2), "float32"),
        lambda: lay.constrain("expert_in", jnp.zeros((6, 2, 2))),
        lambda: jax.jit(functools.partial(lay.use, "expert_in"))(jnp.zeros((6, 2, 2))),
    ):
        with _refused(f"^mine.toml: {message} = 4, 8, ... or a smaller mesh"):
            use()
    with _refused(r"B must divide .*; got B=4, fsdp=2, expert=4; use batch_size .* = 8, 16, "):
        lay.shape_per_device("tokens", (4, 2, 2))
    with _refused("E=6(.|\n)*M=3, fsdp=2"):
        lay.shape_per_device("expert_in", (6, 3, 2))


def _tiny(**changes: Any) -> config.ModelConfig:
    model = cards.load_model("tiny")
    assert model.moe is not None
    tables = {
        name: dataclasses.replace(getattr(model, name), **changes.pop(name, {}))
        for name in ("moe", "train")
    }
    return dataclasses.replace(model, **tables, **changes)


def test_a_model_that_fits():
    model = _tiny()
    for name in cards.names("shardings"):
        lay = Layout.load(name)
        lay.on(max(1, lay.config.mesh.shape.count(-1) * 8)).check(model)
    Layout.load("expert").on(8).check(model, 8, 512)


_MISFITS = [
    (
        _tiny(moe={"num_experts": 6}),
        {},
        r"mine.toml: layout.expert_in: E must divide by its mesh axes; got E=6 \(models/x.toml\), "
        r"expert=4; use num_experts = 4, 8, ... or a smaller mesh",
    ),
    (
        _tiny(train={"batch_size": 12}),
        {},
        r"layout.token_ids: B must divide .*; got B=12 \(models/x.toml\), fsdp=2, expert=4; "
        r"use batch_size / accumulate = 8, 16, .*; so too tokens, .*dense_hidden",
    ),
    # Accumulation: what a device sees at once is what must divide.
    (_tiny(train={"batch_size": 16, "accumulate": 4}), {}, r"layout.token_ids: B .*; got B=4 "),
    (
        _tiny(moe={"group_size": 1024}, train={"batch_size": 16}),
        {},
        r"layout.groups: G must divide .*; got G=4 .*, fsdp=2, expert=4; "
        r"use batch_size / accumulate \* seq_len / group_size = 8, 16",
    ),
    (_tiny(), {"batch_size": 4}, r"layout.token_ids: B must divide .*; got B=4"),
    (
        _tiny(),
        {"batch_size": 8, "seq_len": 100},
        r"group_size must divide the tokens of a forward pass; got batch_size=8, seq_len=100, "
        r"tokens=800, group_size=256 \(models/x.toml\)",
    ),
    (
        _tiny(),
        {"seq_len": 1024},
        r"seq_len must be at most max_positions; got batch_size=16, seq_len=1024, .*=512",
    ),
    (_tiny(), {"batch_size": 0}, r"the batch must not be empty; got batch_size=0, seq_len=256"),
    (_tiny(), {"seq_len": 0}, r"the batch must not be empty; got batch_size=16, seq_len=0"),
]


@pytest.mark.parametrize(("model", "batch", "message"), _MISFITS)
def test_a_model_that_does_not_fit(model: config.ModelConfig, batch: Any, message: str):
    with _refused(message):
        _layout(_mesh()).check(model, **batch, source="models/x.toml")


def test_all_misfits_at_once_and_of_the_optimizer_too():
    lay = _layout(_mesh(), optimizer={"router": "M E/expert"})
    model = _tiny(moe={"num_experts": 6}, train={"batch_size": 12})
    with pytest.raises(LayoutError) as error:
        lay.check(model)
    lines = str(error.value).splitlines()
    # A mistake is said once, with every tensor that has it; what is laid out as stored, once.
    assert [line.split(": ")[1] for line in lines] == [
        "layout.expert_in",
        "layout.token_ids",
        "layout.groups",
    ]
    assert "optimizer.router" in lines[0] and "optimizer.expert_in" not in str(error.value)
    assert "tokens" in lines[1].split("; so too ")[1].split(", ")


def test_what_the_model_lacks_need_not_divide():
    """It has rotary positions, no biases, and here no dense block."""
    lay = _layout(_mesh(), roles={"positions": "W/expert M", "dense_in": "M F/expert"})
    model = _tiny(max_positions=257, dense_hidden_dim=5)
    with _refused(r"layout.dense_in: F must divide .*; got F=5 .*, expert=4") as error:
        lay.check(model)
    assert "layout.positions" not in str(error.value)
    lay.check(_tiny(max_positions=257, dense_hidden_dim=5, moe={"every": 1}))


# Equality.


def test_equal_cards_on_equal_meshes_are_equal():
    again = lambda **kw: Layout(_card(**kw), source="elsewhere.toml")  # noqa: E731
    lay = _layout()
    assert lay == again() and hash(lay) == hash(again())
    assert lay.on(8) == again().on(8) and hash(lay.on(8)) == hash(again().on(8))
    assert _layout(_mesh()) == _layout(_mesh())
    others = [lay.on(8), lay.on(16), _layout(_mesh()), _layout("expert=2"), again(gather=())]
    for one, other in itertools.combinations([lay, *others], 2):
        assert one != other
    assert lay != "mine.toml"
    assert repr(lay).startswith("Layout(mine.toml, mesh=MeshConfig(axes=('fsdp', 'expert')")


def test_a_layout_may_be_a_static_argument():
    traced = []

    @functools.partial(jax.jit, static_argnums=0)
    def f(lay: Layout, x: jax.Array) -> jax.Array:
        traced.append(lay)
        return lay.constrain("router", x)

    for lay in (_layout(), _layout(), _layout("expert=2")):
        f(lay, jnp.zeros((8, 8)))
    assert len(traced) == 2


# What XLA is told.


def test_constrain_lays_out_and_changes_no_value():
    x = _numbers(7, 8, 6, 5)
    lay = _layout()
    for y in (lay.constrain("expert_in", x), jax.jit(lambda x: lay.constrain("expert_in", x))(x)):
        assert y.sharding.is_equivalent_to(lay.sharding("expert_in", ndim=4), 4)
        assert (y == x).all()


def test_constrain_takes_the_mesh_that_is_set():
    """A layout without a mesh of its own follows the caller's."""
    mesh = _mesh(sizes=(4, 2))
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: _layout().constrain("router", x))(_numbers(8, 8))
        z = jax.jit(lambda x: _layout().constrain("tokens", x))(_numbers(8, 8, 2))
    assert y.sharding.mesh == z.sharding.mesh == mesh
    assert z.sharding.spec == P(("fsdp", "expert"))


def test_a_bound_layout_keeps_the_sizes_of_its_mesh():
    bound = Layout.load("expert_data", mesh="expert=2").on(8)
    assert dict(bound.mesh(jax.devices()).shape) == bound.axis_sizes == {"data": 4, "expert": 2}
    with _refused("devices=4"):
        bound.mesh(jax.devices()[:4])
    with jax.set_mesh(Layout.load("expert_data").mesh()), _refused("got data=2, expert=4, bound"):
        jax.jit(lambda x: bound.constrain("tokens", x))(jnp.zeros((8, 4, 2)))


def test_values_cannot_be_laid_out_on_an_abstract_mesh():
    with _refused("values need devices; got an abstract mesh of 8"):
        Layout.load("expert_data").on(8).constrain("tokens", jnp.zeros((8, 4, 2)))


def test_an_abstract_mesh_can_be_traced():
    lay = _layout().on(1024)
    out = jax.eval_shape(lambda x: lay.use("expert_in", x), jax.ShapeDtypeStruct((8, 512, 4), "f4"))
    assert out.shape == (8, 512, 4)


def test_constrain_reshards_in_an_explicit_mesh():
    mesh = _mesh(_EXPLICIT, _EXPLICIT)
    with jax.set_mesh(mesh):
        x = jax.device_put(_numbers(8, 6, 5), P())
        lay = _layout()
        f = jax.jit(lambda x: lay.constrain("expert_in", x))
        assert jax.typeof(f(x)).sharding.spec == P("expert", "fsdp", None)
        assert jax.typeof(lay.use("expert_in", f(x))).sharding.spec == P("expert", None, None)
        assert (f(x) == x).all()
    # And when it is the layout's own.
    y = _layout(mesh).constrain("expert_in", jax.device_put(x, NamedSharding(mesh, P())))
    assert y.sharding.spec == P("expert", "fsdp", None)


@pytest.mark.parametrize("kind", [_AUTO, _EXPLICIT])
@pytest.mark.parametrize("manual", [{"expert"}, {"fsdp"}, {"fsdp", "expert"}])
def test_manual_axes_are_dropped_inside_shard_map(kind: AxisType, manual: set[str]):
    """E=4 on expert=4: inside, a device's one expert divides by nothing, and need not."""
    mesh = _mesh(kind, kind)
    lay = _layout(mesh)
    x = _numbers(4, 6, 5)
    spec = P("expert" if "expert" in manual else None, "fsdp" if "fsdp" in manual else None)
    shapes = []

    def body(x: jax.Array) -> jax.Array:
        shapes.append(x.shape)
        y = lay.constrain("expert_in", x)
        if kind is _EXPLICIT:
            free = [axis if axis not in manual else None for axis in ("expert", "fsdp")]
            assert jax.typeof(y).sharding.spec == P(*free, None)
        return y

    with jax.set_mesh(mesh):
        run = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, axis_names=manual)
        y = jax.jit(run)(jax.device_put(x, NamedSharding(mesh, spec)))
    assert shapes[0] == (1 if "expert" in manual else 4, 3 if "fsdp" in manual else 6, 5)
    assert (np.asarray(y) == np.asarray(x)).all()


def test_a_dim_left_to_xla_must_divide_inside_shard_map_too():
    mesh = _mesh()
    lay = _layout(mesh)
    body = jax.shard_map(
        lambda x: lay.constrain("expert_in", x),
        mesh=mesh,
        in_specs=P("expert"),
        out_specs=P("expert"),
        axis_names={"expert"},
    )
    with _refused(r"layout.expert_in: M must divide by its mesh axes; got M=3, fsdp=2"):
        jax.jit(body)(jnp.zeros((4, 3, 2)))


def test_use_gathers_on_the_way_in_and_scatters_on_the_way_back():
    lay = _layout()
    w = jax.device_put(_numbers(8, 6), lay.sharding("dense_in"))
    x = jax.device_put(_numbers(16, 8), NamedSharding(lay.mesh(), P(("fsdp", "expert"))))

    @jax.jit
    def step(w: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        used, back = jax.vjp(lambda w: lay.use("dense_in", w), w)
        (dw,) = back(x.T @ (x @ used))
        return used, dw

    used, dw = step(w, x)
    assert used.sharding.is_equivalent_to(lay.sharding("dense_in", "used"), 2)
    assert dw.sharding.is_equivalent_to(lay.sharding("dense_in"), 2)
    # Small integers: every order of summation gives the same bits.
    expected = np.asarray(x).T @ (np.asarray(x) @ np.asarray(w))
    assert (np.asarray(used) == np.asarray(w)).all() and (np.asarray(dw) == expected).all()


def test_an_axis_that_is_not_gathered_stays():
    lay = _layout(gather=())
    assert lay.spec("dense_in", "used") == lay.spec("dense_in") == P("fsdp", None)
    both = _layout(gather=("fsdp", "expert"), roles={"dense_in": "M/fsdp/expert F"})
    assert both.spec("dense_in", "used") == P(None, None)
    assert both.spec("dense_in") == P(("fsdp", "expert"), None)
    some = _layout(roles={"dense_in": "M/fsdp/expert F"})
    assert some.spec("dense_in", "used") == P("expert", None)


# Sizes.


def test_the_size_of_every_letter_by_hand():
    model = _tiny(train={"batch_size": 16, "accumulate": 2})
    sizes = layout.letter_sizes(model)
    # 8 sequences of 256 in groups of 256; C = 2 * 256 * 1.25 / 8.
    assert sizes == dict(
        B=8,
        L=256,
        M=128,
        N=4,
        J=2,
        D=32,
        V=256,
        F=384,
        W=512,
        G=8,
        S=256,
        E=8,
        C=80,
        K=2,
        H=192,
        R=4096,
    )
    assert layout.letter_sizes(model, 4, 512) == sizes | dict(B=4, L=512)
    dense = dataclasses.replace(model, moe=None)
    assert layout.letter_sizes(dense).keys() == set("BLMNJDVFW")
    assert "F" not in layout.letter_sizes(_tiny(moe={"every": 1}))
    assert set(sizes) <= set(layout.LETTERS)


def test_every_letter_of_a_role_has_a_name():
    letters = {letter for text in layout.ROLES.values() for letter in text.split()}
    assert letters == set(layout.LETTERS)
    assert not set(layout.PARAMETERS) & set(layout.ACTIVATIONS)


def test_messages_name_the_card_and_the_key():
    with pytest.raises(LayoutError) as error:
        Layout.load("expert").on(8).check(_tiny(moe={"num_experts": 4}), source="models/x.toml")
    for line in str(error.value).splitlines():
        assert re.match(r"shardings/expert.toml: layout.\w+: E must divide .* expert=8; use", line)
