"""Exchange by hand: one `shard_map` in which tokens travel, or weights, or some of both.

What XLA's partitioner makes of `spmd`'s annotations is written out here, so that nothing else can
be made of them: a device cuts its slots by the group that has the experts, sends each its part by
an all-to-all over a leading device axis, computes what it gets and sends it back. In a group of
more than one device the experts' weights go round in a ring, and each device computes with what it
has while the next arrives. Pieces are unrolled; nothing orders them but their data (and, where
links are to take turns, a barrier): the compiler lets one travel while another is computed.

The backward is written out too, so that it keeps no weights: they go round again, and the sums of
their gradients travel with them until they are home (the memory does not grow with the experts that
visit). Weight gradients are summed in float32, over all pieces, before they leave the device. Gates
weigh the hidden layer where the experts are, so that their gradient needs no output again.

A groups of devices that tokens cross between, R devices of a ring, e experts that a device has at a
step, g groups of tokens, C slots, m the model width that travels. See `part`.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Key

from gshard_moe import config as configs
from gshard_moe import experts
from gshard_moe import layout as layouts
from gshard_moe.dispatch import Slots, einsum, gather
from gshard_moe.exchange import choose, on_devices
from gshard_moe.exchange import chunks as chunking
from gshard_moe.exchange.part import Part, Weights, vary
from gshard_moe.exchange.sizes import Sizes
from gshard_moe.experts import ROLES, ExpertWeights
from gshard_moe.layout import Layout


def exchange(
    x_GSM: Float[Array, "G S M"],
    slots: Slots,
    weights: ExpertWeights,
    *,
    config: configs.MoEConfig,
    layout: Layout,
    dropout_key_G: Key[Array, " G"] | None = None,
    fewer: bool = False,
) -> Float[Array, "G S M"]:
    """Takes tokens and experts to each other, and the results back to the tokens.

    Args:
      x_GSM: the tokens.
      slots: who goes where.
      weights: of all experts, as stored.
      config: of the experts.
      layout: on a mesh; its card says how.
      dropout_key_G: a key for each group, where hidden units are dropped.
      fewer: takes fewer chunks where there cannot be as many.
    Returns:
      The weighted sum of each token's served experts.
    Raises:
      ValueError: if there are more chunks than experts on a device and than slots.
    """
    gate_EGC, key_EGC2 = with_slots(slots, dropout_key_G)
    if layout.config.compute.dispatch == "einsum":
        einsum.warn_of_masks(x_GSM.shape[:2], slots.token_GEC.shape, config.hidden_dim)
        served_GSK = (slots.slot_GSK >= 0).astype(x_GSM.dtype)
        mask_GSEC = layout.constrain("mask", einsum.mask(slots, served_GSK))
        xs_EGCM = einsum.dispatch(x_GSM, mask_GSEC)
        add: Callable = functools.partial(einsum.combine, mask_GSEC=mask_GSEC)
    else:
        xs_EGCM = gather.dispatch(x_GSM, slots)
        add = functools.partial(gather.add, slots=slots)
    xs_EGCM = layout.constrain("slots_source", xs_EGCM)
    part = part_of(x_GSM, slots, weights, config=config, layout=layout)
    again = layout.config.compute.computes_again
    layer = Layer(part, config, fewer, again, key_impl(dropout_key_G))
    ys_EGCM = carry(layer, xs_EGCM, gate_EGC, key_EGC2, weights, layout)
    with jax.named_scope("combine"):
        return add(layout.constrain("slots_source", ys_EGCM))


def part_of(
    x_GSM: jax.Array,
    slots: Slots,
    weights: ExpertWeights,
    *,
    config: configs.MoEConfig,
    layout: Layout,
) -> Part:
    """Returns a device's part in the exchange of these, with the fetch that the card says.

    Args:
      x_GSM: the tokens.
      slots: who goes where.
      weights: of all experts, as stored.
      config: of the experts.
      layout: on a mesh.
    """
    stored = tuple((ROLES[name], weight.shape) for name, weight in weights.held().items())
    for role, shape in stored:
        layout.require_divisible(role, shape)
    num_groups, num_experts, capacity = slots.token_GEC.shape
    sizes = Sizes(
        (num_experts, num_groups, capacity, x_GSM.shape[-1]),
        slots.slot_GSK.shape,
        stored,
        x_GSM.dtype.itemsize,
        dropout=config.expert_dropout > 0,
        recomputed=layout.config.compute.computes_again,
    )
    return choose.part_of(layout, sizes, layouts.free_axes(layouts.mesh_here(layout)))


def with_slots(slots: Slots, dropout_key_G: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    """Returns what goes with slots: gates [E, G, C], and the data of dropout's keys, if any."""
    gate_EGC = gather.gates(slots).astype(jnp.float32)
    if dropout_key_G is None:
        return gate_EGC, None
    num_experts = slots.token_GEC.shape[1]
    numbers = np.arange(num_experts)
    key_EGC = experts.slot_keys(dropout_key_G, slots.token_GEC, numbers, num_experts)
    return gate_EGC, jax.random.key_data(key_EGC)


def key_impl(key: jax.Array | None) -> Any:
    """Returns how a key makes numbers; None without one."""
    return None if key is None else jax.random.key_impl(key)


@runtime_checkable
class OnDevice(Protocol):
    """One layer on one device, inside `shard_map`: slots of tokens, or what is made into them."""

    @property
    def part(self) -> Part:
        """Who the device's peers are."""
        ...

    @property
    def again(self) -> bool:
        """Whether `backward` gets what `forward` got, and not what it keeps."""
        ...

    @property
    def kept_spec(self) -> Any:
        """How devices differ in what `forward` keeps, of which each has a part of dim 0."""
        ...

    def forward(
        self, xs: jax.Array, gates: jax.Array, extras: Any, held: Weights, /
    ) -> tuple[jax.Array, Any]:
        """Returns the outputs, and what the backward needs."""
        ...

    def backward(
        self, kept: Any, gates: jax.Array, extras: Any, held: Weights, dys: jax.Array, /
    ) -> tuple[jax.Array, jax.Array, Weights]:
        """Returns the gradients of slots, gates and weights."""
        ...


def carry(
    layer: OnDevice,
    xs_EGCM: jax.Array,
    gate_EGC: jax.Array,
    extras: Any,
    weights: ExpertWeights,
    layout: Layout,
) -> jax.Array:
    """Takes slots to their experts and back, forward and backward each in a `shard_map`.

    Args:
      layer: on a device.
      xs_EGCM: the slots.
      gate_EGC: weighs each slot.
      extras: what else goes with slots: any tree of arrays [E, G, ...], without gradients.
      weights: of all experts, as stored.
      layout: on a mesh.
    """
    part, held = layer.part, weights.held()
    slots_spec = P(None, part.groups or None, None, part.width or None)
    extra_spec = P(None, part.groups or None)
    held_spec = {name: layout.spec(ROLES[name]) for name in held}
    inputs = slots_spec, extra_spec, extra_spec, held_spec
    kept_spec = slots_spec if layer.again else layer.kept_spec

    local = functools.partial(on_devices.on_each_device, layout)

    @jax.custom_vjp
    def run(xs: jax.Array, gates: jax.Array, keys: Any, held: Weights) -> jax.Array:
        outputs = local(lambda *args: layer.forward(*args)[0], inputs, slots_spec)
        return outputs(xs, gates, keys, held)

    def forward(xs: jax.Array, gates: jax.Array, keys: Any, held: Weights) -> tuple:
        if layer.again:
            return run(xs, gates, keys, held), (xs, gates, keys, held)
        keeping = local(layer.forward, inputs, (slots_spec, kept_spec))
        ys, kept = keeping(xs, gates, keys, held)
        return ys, (kept, gates, keys, held)

    def backward(saved: tuple, dys: jax.Array) -> tuple:
        specs = kept_spec, extra_spec, extra_spec, held_spec, slots_spec
        run = local(layer.backward, specs, (slots_spec, extra_spec, held_spec))
        dxs, dgates, dheld = run(*saved, dys)
        return dxs, dgates, None, dheld

    run.defvjp(forward, backward)
    # Of what a caller's `shard_map` has made vary, the gradients are summed by it.
    leaves, tree = jax.tree.flatten((xs_EGCM, gate_EGC, held))
    xs_EGCM, gate_EGC, held = tree.unflatten(experts.varying_alike(*leaves))
    return run(xs_EGCM, gate_EGC, extras, held)


class _Piece(NamedTuple):
    """What is computed at once.

    Attributes:
      x: tokens [A, e, g, c, M], where their experts are.
      products: what goes into the activation.
    """

    x: jax.Array
    products: list[jax.Array]


class _Kept(NamedTuple):
    """What the backward needs, of the device.

    Attributes:
      steps: the pieces of each step.
      gates, keys: as they have arrived.
    """

    steps: list[list[_Piece]]
    gates: jax.Array
    keys: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer on one device.

    Attributes:
      part: the device's.
      config: of the experts.
      fewer: takes fewer chunks where there cannot be as many.
      again: the backward computes products again, of the slots, instead of keeping them; in one
        piece, in which all that travels has something to hide behind: tokens behind the gradients'
        first product, the gradients behind the block that is computed again before.
      key_impl: of the keys of dropout.
    """

    part: Part
    config: configs.MoEConfig
    fewer: bool
    again: bool
    key_impl: Any = None

    @property
    def kept_spec(self) -> P:
        """How devices differ in what `forward` keeps, of which each has a part of dim 0."""
        return P(self.part.axes or None)

    def forward(
        self, xs_EgCm: jax.Array, gates: jax.Array, keys: Any, held: Weights
    ) -> tuple[jax.Array, "_Kept"]:
        """Returns the slots' outputs, and what the backward needs."""
        part = self.part
        xs, keys = self._by_block(xs_EgCm), self._extras(keys)
        gates = self._extras(gates)
        where = self._cut(xs, part.pieces)
        blocks, ring = _Blocks(part, xs), _Ring(part, part.used(held, xs.dtype))
        steps = []
        for step in range(part.ring):
            used = part.gathered(ring.next())
            block = functools.partial(_split, where, block=part.at(step))
            pieces, out = [], []
            turns = _Turns(part)
            arriving = _ahead(turns.go, block(xs))
            sides = zip(arriving, block(gates), block(keys), _weights(where, used), strict=True)
            for x, gate, key, own in sides:
                products = self._products(x, own)
                y = self._outputs(self._hidden(products, gate, key), gate, own)
                out.append(turns.back(ring.computed(y, len(out) + 1 == len(where.sizes))))
                pieces.append(_Piece(x, products))
            steps.append(pieces)
            blocks.put(step, _joined(where, out))
        kept = jax.tree.map(lambda x: x[None], _Kept(steps, gates, keys))
        return blocks.whole(xs_EgCm.shape), kept

    def backward(
        self,
        kept: Any,
        gates: jax.Array,
        keys: Any,
        held: Weights,
        dys_EgCm: jax.Array,
    ) -> tuple[jax.Array, jax.Array, Weights]:
        """Returns the gradients of slots, gates and weights.

        Args:
          kept: `forward`'s; or the slots, where products are computed again.
          gates: the slots'.
          keys: of dropout.
          held: the weights.
          dys_EgCm: the gradients of the outputs.
        """
        part = self.part
        if not self.again:  # else the compiler may keep what `forward` had gathered of them
            held, dys_EgCm = jax.lax.optimization_barrier((held, dys_EgCm))
            steps, arrived, keys = jax.tree.map(lambda x: x[0], kept)
            gates_back = jax.vjp(self._extras, gates)[1]
        else:
            steps, keys = [], self._extras(keys)
            arrived, gates_back = jax.vjp(self._extras, gates)
        dys = self._by_block(dys_EgCm)
        used = functools.partial(part.used, dtype=dys.dtype)
        own, held_back = jax.vjp(used, held)
        where = self._cut(dys, 1 if self.again else part.pieces)
        blocks, gate_blocks, ring = _Blocks(part, dys), _Blocks(part, arrived), _Ring(part, own)
        total: Weights = {}
        for step in range(part.ring):
            here = jax.tree.map(lambda w: w.astype(jnp.float32), part.gathered(ring.next()))
            block = functools.partial(_split, where, block=part.at(step))
            turns = _Turns(part)
            arriving = _ahead(turns.go, block(dys))
            if self.again:
                (x,) = block(self._by_block(kept))
                arriving, found = self._again(turns, next(arriving), x, here)
            else:
                found = steps[step]
            out, dgates, dhere = [], [], []
            sides = zip(
                arriving, found, block(arrived), block(keys), _weights(where, here), strict=True
            )
            for dy, piece, gate, key, weights in sides:
                dx, dgate, dweights = self._piece_back(piece, dy, gate, key, weights)
                out.append(turns.back(ring.computed(dx, len(out) + 1 == len(where.sizes))))
                dgates.append(dgate)
                dhere.append(dweights)
            blocks.put(step, _joined(where, out))
            gate_blocks.put(step, _joined(where, dgates))
            mine = part.scattered(_joined_weights(where, dhere))
            total = jax.tree.map(jnp.add, part.handed_on(total), mine) if step else mine
            ring.summed(total)
        total = {name: w.astype(dys.dtype) for name, w in total.items()}
        if part.ring > 1:
            total = part.handed_on(total)  # home
        (dgates,) = gates_back(gate_blocks.whole(arrived.shape))
        (dheld,) = held_back(total)
        return blocks.whole(dys_EgCm.shape), dgates, dheld

    def _again(
        self, turns: "_Turns", dy: jax.Array, x: jax.Array, weights: Weights
    ) -> tuple[list[jax.Array], list[_Piece]]:
        """Returns gradients that have arrived, and what `forward` would have kept of their slots.

        The slots leave after that. Else the compiler may send them first, though they are there
        only once the block has been computed again: behind that the gradients' way is hidden.
        """
        dy, x = jax.lax.optimization_barrier((dy, x))
        x = turns.go(x)
        return [dy], [_Piece(x, self._products(x, weights))]

    def _piece_back(
        self, piece: _Piece, dy: jax.Array, gate: jax.Array, key: jax.Array | None, weights: Weights
    ) -> tuple[jax.Array, jax.Array, Weights]:
        """Returns the gradients of a piece's tokens, gates and weights."""
        of_outputs = {name: w for name, w in weights.items() if name.startswith("out_")}
        of_inputs = {name: w for name, w in weights.items() if name not in of_outputs}
        # It is linear: its gradient needs no value of the hidden layer.
        like = jnp.zeros_like(piece.products[0])
        (dh,) = jax.vjp(lambda h: self._outputs(h, gate, of_outputs), like)[1](dy)
        # Without barriers the compiler computes the activation again in each product it goes into.
        products, dh = jax.lax.optimization_barrier((piece.products, dh))
        h, hidden_back = jax.vjp(functools.partial(self._hidden, key=key), products, gate)
        dproducts, dgate = hidden_back(dh)
        h, dproducts = jax.lax.optimization_barrier((h, dproducts))
        outputs = functools.partial(self._outputs, h)
        of_bias, dw_out = jax.vjp(outputs, gate, of_outputs)[1](dy)
        dx, dw_in = jax.vjp(self._products, piece.x, of_inputs)[1](dproducts)
        return dx, dgate + of_bias, dw_in | dw_out

    def _by_block(self, x_EgCX: jax.Array) -> jax.Array:
        """Returns slots [A, R, e, g, C, ...]."""
        part = self.part
        return x_EgCX.reshape(part.across, part.ring, -1, *x_EgCX.shape[1:])

    def _extras(self, extra: Any) -> Any:
        """Sends what goes with slots, all of it at once: it is small."""
        if extra is None:
            return None
        return vary(self.part.swap(self._by_block(extra)), self.part.axes)

    def _cut(self, xs: jax.Array, chunks: int) -> chunking.Cut:
        by = self.part.config.chunk_by
        size: Any = {"num_experts": xs.shape[2], "capacity": xs.shape[4], "parts": 1, "by": by}
        if self.fewer:
            chunks = min(chunks, chunking.most(**size))
        return chunking.cut(chunks, **size)

    def _products(self, x: jax.Array, own: Weights) -> list[jax.Array]:
        with jax.named_scope("expert"):
            return experts.products(_named(own), x, self._form(None))

    def _hidden(
        self, products: list[jax.Array], gate: jax.Array, key: jax.Array | None
    ) -> jax.Array:
        with jax.named_scope("expert"):
            return experts.hidden(products, self.config, self._form(key), gate)

    def _outputs(self, h: jax.Array, gate: jax.Array, own: Weights) -> jax.Array:
        with jax.named_scope("expert"):
            return experts.outputs(_named(own), h, self._form(None), gate)

    def _form(self, key: jax.Array | None) -> experts.Form:
        """Returns the form of slots [A, e, g, c, ...]; the hidden dim may be a part of it."""
        hidden = self.part.hidden
        parts, at = on_devices.parts_and_place(hidden)

        def multiply(role: str, x: jax.Array, *weights_EXY: jax.Array) -> list[jax.Array]:
            return [_product(x, weight_EXY) for weight_EXY in weights_EXY]

        def bias(role: str, bias_EX: jax.Array) -> jax.Array:
            if role == "expert_out_bias" and hidden:  # once, in a sum over the hidden axes
                bias_EX = jnp.where(at == 0, bias_EX, 0)
            return bias_EX[None, :, None, None, :]

        def drop(h: jax.Array) -> jax.Array:
            assert key is not None
            key_X = jax.random.wrap_key_data(key.reshape(-1, key.shape[-1]), impl=self.key_impl)
            rows_XH = h.reshape(-1, h.shape[-1])
            share = self.config.expert_dropout
            return experts.dropped(rows_XH, key_X, share, parts=parts, at=at).reshape(h.shape)

        return experts.Form(multiply, bias, lambda h: h, None if key is None else drop)


class _Ring:
    """Weights that go round: a step's, and those on their way.

    A barrier keeps the rest at home until a step is computed: without it the compiler sends all of
    them at once, and keeps them.
    """

    def __init__(self, part: Part, own: Weights):
        self._part = part
        self._coming = [own]
        self._left = part.ring - 1
        self._sums: Weights = {}

    def next(self) -> Weights:
        """Returns this step's weights, and sends for more."""
        while self._left and len(self._coming) <= self._part.config.prefetch:
            self._coming.append(self._part.handed_on(self._coming[-1]))
            self._left -= 1
        return self._coming[0]

    def computed(self, y: jax.Array, last: bool) -> jax.Array:
        """Gives up this step's weights with its last result."""
        if last:
            self._coming.pop(0)
            if self._left:
                self._coming[-1], y = jax.lax.optimization_barrier((self._coming[-1], y))
        return y

    def summed(self, total: Weights) -> None:
        """Holds the next step's weights back until the sums of the step before can be sent.

        Of this step they may wait: the products they are made of are something to hide behind.
        """
        if self._coming and self._sums:
            self._coming[-1], _ = jax.lax.optimization_barrier((self._coming[-1], self._sums))
        self._sums = total


class _Turns:
    """Sends tokens to their experts and back; where links take turns, one after the other."""

    def __init__(self, part: Part):
        self._part = part
        self._last: jax.Array | None = None

    def go(self, x: jax.Array) -> jax.Array:
        """Takes tokens, or gradients of outputs, to the experts."""
        return self._done(self._part.whole(self._part.swap(self._turn(x))))

    def back(self, y: jax.Array) -> jax.Array:
        """Takes outputs, or gradients of tokens, back."""
        return self._done(self._part.swap(self._part.summed(self._turn(y))))

    def _turn(self, x: jax.Array) -> jax.Array:
        if self._last is None:
            return x
        return jax.lax.optimization_barrier((x, self._last))[0]

    def _done(self, x: jax.Array) -> jax.Array:
        if self._part.config.links == "one":
            self._last = x
        return x


class _Blocks:
    """Results [A, R, e, ...] of all steps, each in its place."""

    def __init__(self, part: Part, like: jax.Array):
        self._part = part
        self._all: jax.Array | None = None
        if part.ring > 1:
            alike = jax.typeof(like).manual_axis_type.varying
            self._all = vary(jnp.zeros(like.shape, like.dtype), tuple(alike))

    def put(self, step: int, result: jax.Array) -> None:
        """Puts a step's result [A, e, ...]."""
        if self._all is None:
            self._all = result[:, None]
        else:
            at = self._part.at(step)
            self._all = jax.lax.dynamic_update_slice_in_dim(self._all, result[:, None], at, axis=1)

    def whole(self, shape: Sequence[int]) -> jax.Array:
        """Returns all of them."""
        assert self._all is not None
        return self._all.reshape(shape)


def _ahead(go: Callable[[jax.Array], jax.Array], pieces: list[jax.Array]) -> Iterator[jax.Array]:
    """Yields what arrives of each piece, with the next one on its way."""
    coming = [go(pieces[0])]
    for piece in pieces[1:]:
        coming.append(go(piece))
        yield coming.pop(0)
    yield coming.pop(0)


def _split(where: chunking.Cut, x: jax.Array | None, *, block: jax.Array | int) -> list[Any]:
    """Cuts one block of [A, R, e, g, C, ...] into pieces [A, e, g, c, ...]."""
    if x is None:
        return [None] * len(where.sizes)
    if x.shape[1] == 1:
        own = x.reshape(x.shape[0], *x.shape[2:])
    else:
        own = jax.lax.dynamic_index_in_dim(x, block, axis=1, keepdims=False)
    return list(jax.lax.split(own, where.sizes, axis=_dim(where)))


def _joined(where: chunking.Cut, pieces: list[jax.Array]) -> jax.Array:
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=_dim(where))


def _dim(where: chunking.Cut) -> int:
    return 1 if where.parts else 3


def _weights(where: chunking.Cut, used: Weights) -> list[Weights]:
    """Returns each piece's weights: those of its experts, or all."""
    if not where.parts:
        return [used] * len(where.sizes)
    cut = {name: jax.lax.split(w, where.sizes, axis=0) for name, w in used.items()}
    return [{name: cut[name][i] for name in used} for i in range(len(where.sizes))]


def _joined_weights(where: chunking.Cut, pieces: list[Weights]) -> Weights:
    """Returns the gradients of all weights: the transpose of `_weights`."""

    def join(*gradients: jax.Array) -> jax.Array:
        if len(gradients) == 1:
            return gradients[0]
        return jnp.concatenate(gradients) if where.parts else functools.reduce(jnp.add, gradients)

    return jax.tree.map(join, *pieces)


def _named(own: Weights) -> ExpertWeights:
    missing: Any = dict.fromkeys(ROLES)
    return ExpertWeights(**missing | own)


@jax.custom_vjp
def _product(x: jax.Array, weight_EXY: jax.Array) -> jax.Array:
    """Multiplies [A, e, g, c, X] by each expert's matrix, in the dtype of `x`.

    The gradient of the matrix is in its own dtype, float32, and so are sums of such gradients.
    """
    y = jnp.einsum("aetx,exy->aety", _flat(x), weight_EXY.astype(x.dtype))
    return y.reshape(*x.shape[:-1], -1)


def _product_forward(x: jax.Array, weight_EXY: jax.Array) -> tuple[jax.Array, tuple]:
    return _product(x, weight_EXY), (x, weight_EXY)


def _product_backward(saved: tuple, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, weight_EXY = saved
    dx = jnp.einsum("aety,exy->aetx", _flat(dy), weight_EXY.astype(x.dtype))
    exact = weight_EXY.dtype
    dw_EXY = jnp.einsum("aetx,aety->exy", _flat(x), _flat(dy), preferred_element_type=exact)
    return dx.reshape(x.shape), dw_EXY


_product.defvjp(_product_forward, _product_backward)


def _flat(x: jax.Array) -> jax.Array:
    """Makes [A, e, t, X] of [A, e, g, c, X], and A one too where there is one expert: matmuls."""
    A, e, _, _, X = x.shape
    return x.reshape(A, e, -1, X) if e > 1 else x.reshape(1, 1, -1, X)
