"""The ragged all-to-all against a numpy loop over slices, values and gradients, with `==`."""

import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from gshard_moe.exchange import ragged_all_to_all as ways

AXES = ("a", "b")
# Rows of each device's operand and output, which are longer than what is sent and received.
SENT, RECEIVED, WIDTH = 40, 200, 3


class Case(NamedTuple):
    """What goes in: a leading dim of devices, then slices or rows."""

    operand: np.ndarray
    output: np.ndarray
    input_offsets: np.ndarray
    send_sizes: np.ndarray
    output_offsets: np.ndarray
    recv_sizes: np.ndarray


def sizes_of(pattern: str, devices: int, slices: int, rng: np.random.Generator) -> np.ndarray:
    """Returns how much each sender sends to each receiver, slice by slice."""
    most = SENT // (devices * slices)
    sizes = rng.integers(0, most + 1, (devices, devices, slices))
    if pattern == "empty":
        sizes[:] = 0
    if pattern == "all to one":
        sizes[:] = 0
        sizes[:, devices - 1, 0] = min(SENT, RECEIVED // devices - 5)
    if pattern == "one device is silent":
        sizes[0], sizes[:, 1] = 0, 0
    return sizes


def make(pattern: str, devices: int, slices: int = 1) -> Case:
    """Draws a case; slices lie in any order, with gaps between them."""
    rng = np.random.default_rng(devices * 10 + slices)
    sizes = sizes_of(pattern, devices, slices, rng)

    def offsets(sizes: np.ndarray, rows: int) -> np.ndarray:
        """Places slices in a random order, a random gap before each."""
        found, at = np.zeros(sizes.size, int), 0
        room = rows - sizes.sum()
        for index in rng.permutation(sizes.size):
            gap = rng.integers(0, room // sizes.size + 1)
            found[index] = at + gap
            at += gap + sizes.flat[index]
        return found.reshape(sizes.shape)

    lands = np.stack([offsets(sizes[:, d], RECEIVED) for d in range(devices)], axis=1)
    begins = np.stack([offsets(sizes[s], SENT) for s in range(devices)])
    return Case(
        rng.integers(1, 9, (devices, SENT, WIDTH)).astype(np.float32),
        rng.integers(-9, 0, (devices, RECEIVED, WIDTH)).astype(np.float32),
        *(
            x.reshape(devices, -1).astype(np.int32)
            for x in (begins, sizes, lands, sizes.swapaxes(0, 1))
        ),
    )


def by_loop(case: Case, dresult: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sends slice by slice; returns the result and both gradients."""
    devices, count = case.send_sizes.shape
    result, doutput = case.output.copy(), dresult.copy()
    doperand = np.zeros_like(case.operand)
    for sender in range(devices):
        for i in range(count):
            receiver = i // (count // devices)
            size = case.send_sizes[sender, i]
            begin, end = case.input_offsets[sender, i], case.output_offsets[sender, i]
            sent, landed = slice(begin, begin + size), slice(end, end + size)
            result[receiver, landed] = case.operand[sender, sent]
            doperand[sender, sent] = dresult[receiver, landed]
            doutput[receiver, landed] = 0
    return result, doperand, doutput


def mesh_of(devices: int) -> jax.sharding.Mesh:
    shape, kinds = (2, devices // 2), (AxisType.Auto,) * 2
    return jax.make_mesh(shape, AXES, devices=jax.devices()[:devices], axis_types=kinds)


def on_mesh(f, devices: int):
    """Runs `f` of a device's arrays, each without the dim of devices."""
    spec = P(AXES)

    def local(*args):
        return jax.tree.map(lambda x: x[None], f(*jax.tree.map(lambda x: x[0], args)))

    return jax.shard_map(local, mesh=mesh_of(devices), in_specs=spec, out_specs=spec)


def with_gradients(operand, output, *rest, emulated: bool = True):
    *route, dresult = rest
    route = ways.route(*route, axis_name=AXES)

    def run(operand, output):
        return ways.ragged_all_to_all(operand, output, route, axis_name=AXES, emulated=emulated)

    result, pull = jax.vjp(run, operand, output)
    return result, *pull(dresult)


@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("pattern", ["random", "empty", "all to one", "one device is silent"])
def test_it_is_a_loop_over_slices(pattern: str, devices: int):
    case = make(pattern, devices)
    dresult = np.random.default_rng(1).integers(-9, 9, case.output.shape).astype(np.float32)
    want = by_loop(case, dresult)
    got = jax.jit(on_mesh(with_gradients, devices))(*case, dresult)
    for name, one, other in zip(("result", "doperand", "doutput"), got, want, strict=True):
        np.testing.assert_array_equal(one, other, err_msg=name)
    assert pattern == "empty" or (want[0] != case.output).any()


def test_several_slices_for_each_device():
    case = make("random", 4, slices=3)
    dresult = np.random.default_rng(1).integers(-9, 9, case.output.shape).astype(np.float32)
    got = jax.jit(on_mesh(with_gradients, 4))(*case, dresult)
    for one, other in zip(got, by_loop(case, dresult), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_example_of_jaxs_documentation():
    case = Case(
        np.array([[1, 2, 2], [3, 4, 0]]),
        np.zeros((2, 4), int),
        *np.array([[[0, 1], [0, 1]], [[1, 2], [1, 1]], [[0, 0], [1, 2]], [[1, 1], [2, 1]]]),
    )

    def run(operand, output, *given):
        route = ways.route(*given, axis_name=AXES)
        return ways.ragged_all_to_all(operand, output, route, axis_name=AXES, emulated=True)

    np.testing.assert_array_equal(jax.jit(on_mesh(run, 2))(*case), [[1, 3, 0, 0], [2, 2, 4, 0]])


def test_the_way_back_brings_everything_home():
    case = make("random", 8)

    def there_and_back(operand, output, *given):
        route = ways.route(*given, axis_name=AXES)
        send = functools.partial(ways.ragged_all_to_all, axis_name=AXES, emulated=True)
        arrived = send(operand, output, route)
        return send(arrived, jnp.zeros_like(operand), ways.turned(route)), route

    home, route = jax.jit(on_mesh(there_and_back, 8))(*case)
    row = np.arange(SENT)[None, :, None]
    begin, size = (x[:, None] for x in (case.input_offsets, case.send_sizes))
    sent = ((row >= begin) & (row < begin + size)).any(axis=-1)
    np.testing.assert_array_equal(home, np.where(sent[..., None], case.operand, 0))
    again = ways.turned(ways.turned(route))
    assert all(one is other for one, other in zip(again, route, strict=True))


def test_bfloat16():
    case = make("random", 4)
    case = case._replace(operand=jnp.bfloat16(case.operand), output=jnp.bfloat16(case.output))
    dresult = jnp.ones(case.output.shape, jnp.bfloat16)
    got = jax.jit(on_mesh(with_gradients, 4))(*case, dresult)
    for one, other in zip(
        got, by_loop(jax.tree.map(np.asarray, case), np.asarray(dresult)), strict=True
    ):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.float32(one), np.float32(other))


@pytest.mark.parametrize("emulated", [False, True])
def test_no_offset_is_exchanged_in_the_backward(emulated: bool):
    case = make("random", 8)
    dresult = np.zeros_like(case.output)

    def collectives(run) -> list[str]:
        program = str(jax.make_jaxpr(on_mesh(run, 8))(*case, dresult))
        return re.findall(r"= (\w*all_to_all|all_gather\w*)\[", program)

    def forward(operand, output, *rest):
        route = ways.route(*rest[:-1], axis_name=AXES)
        return ways.ragged_all_to_all(operand, output, route, axis_name=AXES, emulated=emulated)

    moved = "all_gather" if emulated else "ragged_all_to_all"
    assert collectives(forward) == ["all_to_all", moved]
    both = functools.partial(with_gradients, emulated=emulated)
    assert collectives(both) == ["all_to_all", moved, moved]


def test_slices_that_do_not_divide_by_the_devices_are_refused():
    case = make("random", 4)
    few = [x[:, :3] for x in case[2:]]
    with pytest.raises(ValueError, match=r"as many slices; got 3 slices, 4 devices; give empty"):

        def run(operand, output, *route):
            route = ways.Route(*route, *route[:2])
            return ways.ragged_all_to_all(operand, output, route, axis_name=AXES, emulated=True)

        on_mesh(run, 4)(*case[:2], *few)
