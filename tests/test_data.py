"""A row depends on its index alone, and what the devices get is what `rows` says."""

import collections
import itertools
import threading

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gshard_moe.train import data
from gshard_moe.train.corpus import Corpus
from gshard_moe.train.data import TrainData

# Examples of a test that shuffles few windows: grain is slow at that.
_FEW = 30
# 4 x 2 of the 8 devices.
_MESH_AXES = ("data", "model")
_SPECS = [P(), P("data"), P("model"), P(("data", "model")), P("data", "model"), P(None, "model")]


def _corpus(*, train: int = 100, held_out: int = 50) -> Corpus:
    """Bytes 1, 2, ..., so that up to 255 of them a byte tells where it stood."""
    return Corpus(
        train=np.arange(1, train + 1).astype(np.uint8),
        held_out=np.arange(1, held_out + 1).astype(np.uint8),
        num_train_documents=1,
        num_held_out_documents=1,
        held_out_rule="documents",
        source="counted",
        digest="",
    )


def _train_data(*, batch_size=8, seq_len=4, seed=0, **sizes) -> TrainData:
    return TrainData(_corpus(**sizes), batch_size=batch_size, seq_len=seq_len, seed=seed)


def _sharding(spec: P) -> NamedSharding:
    return NamedSharding(Mesh(np.array(jax.devices()).reshape(4, 2), _MESH_AXES), spec)


def _threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("gshard-moe-data")]


# Rows.


def test_windows_by_hand():
    # 8 bytes, L=3: windows start at 0 and 3 and share byte 4; byte 8 fills no window.
    rows = _train_data(train=8, seq_len=3).rows(0, 2)
    assert rows.dtype == np.int32
    assert sorted(rows.tolist()) == [[1, 2, 3, 4], [4, 5, 6, 7]]


@hypothesis.settings(max_examples=_FEW)
@hypothesis.given(st.integers(2, 200), st.integers(1, 20), st.integers(0, 2**40))
def test_an_epoch_covers_the_corpus(size, seq_len, seed):
    hypothesis.assume(size > seq_len)
    train = _train_data(train=size, seq_len=seq_len, seed=seed)
    for epoch in range(3):
        rows = train.rows(epoch * train.num_windows, (epoch + 1) * train.num_windows)
        targets = np.sort(rows[:, 1:].ravel())
        np.testing.assert_array_equal(targets, np.arange(2, targets.size + 2))
        assert size - 1 - targets.size < seq_len


def test_epochs_are_shuffled_each_in_its_own_way():
    train = _train_data(train=201)
    assert train.num_windows == 50
    epochs = [train.rows(i * 50, (i + 1) * 50)[:, 0] for i in range(5)]
    in_order = np.sort(epochs[0])
    for one, other in itertools.combinations([in_order, *epochs], 2):
        assert np.mean(one == other) < 0.2


def test_the_seed_alone_decides_the_order():
    rows = [_train_data(seed=seed).rows(0, 100) for seed in (3, 3, 4)]
    np.testing.assert_array_equal(rows[0], rows[1])
    assert (rows[0] != rows[2]).any()


def test_neighbouring_seeds_share_no_epoch():
    """Grain shuffles epoch i with its seed + i; ours must not simply be passed on."""
    first, second = (_train_data(train=201, seed=seed).rows(0, 200) for seed in (0, 1))
    for i, j in itertools.product(range(4), repeat=2):
        assert (first[i * 50 : (i + 1) * 50] != second[j * 50 : (j + 1) * 50]).any()


@hypothesis.settings(max_examples=_FEW)
@hypothesis.given(st.integers(0, 10**9), st.integers(0, 40), st.integers(0, 40))
def test_rows_are_random_access(start, first, second):
    train = _train_data()
    middle, stop = start + first, start + first + second
    parts = [train.rows(start, middle), train.rows(middle, stop)]
    np.testing.assert_array_equal(train.rows(start, stop), np.concatenate(parts))


def test_the_batch_size_does_not_change_the_rows():
    one, other = (_train_data(batch_size=size).rows(0, 60) for size in (1, 7))
    np.testing.assert_array_equal(one, other)


# Batches.


@pytest.mark.parametrize("spec", _SPECS, ids=str)
def test_batches_are_the_rows_under_any_sharding(spec):
    train, sharding = _train_data(), _sharding(spec)
    batches = data.batches(train, start=16, sharding=sharding)
    for i, batch in enumerate(itertools.islice(batches, 5)):
        rows = train.rows(16 + 8 * i, 24 + 8 * i)
        np.testing.assert_array_equal(batch.inputs_BL, rows[:, :-1])
        np.testing.assert_array_equal(batch.targets_BL, rows[:, 1:])
        assert batch.position == 24 + 8 * i
        for array in batch[:2]:
            assert array.dtype == np.int32
            assert array.sharding == sharding
    batches.close()


@pytest.mark.parametrize("spec", _SPECS, ids=str)
def test_every_row_is_read_once_for_all_devices_and_both_arrays(spec, monkeypatch):
    reads = collections.Counter()
    rows = TrainData.rows

    def counted(self, start, stop):
        reads.update(range(start, stop))
        return rows(self, start, stop)

    monkeypatch.setattr(TrainData, "rows", counted)
    data._train_batch(_train_data(), _sharding(spec), 24)
    assert reads == dict.fromkeys(range(24, 32), 1)


def test_a_process_reads_only_the_rows_of_its_devices(monkeypatch):
    """A process with two of the four `data` shards, played by an array of those shards alone."""
    sharding = _sharding(P("data"))
    indices = sharding.addressable_devices_indices_map((8, 4))
    mine = sharding.mesh.devices[2:].ravel()
    reads = set()

    def make_local(shape, sharding, read, dtype=None):
        blocks = {device: read(indices[device]) for device in mine}
        return jax.numpy.concatenate([blocks[device] for device in mine[::2]])

    rows = TrainData.rows
    monkeypatch.setattr(
        TrainData, "rows", lambda self, a, b: reads.update(range(a, b)) or rows(self, a, b)
    )
    monkeypatch.setattr(jax, "make_array_from_callback", make_local)
    train = _train_data()
    batch = data._train_batch(train, sharding, 40)
    assert reads == {44, 45, 46, 47}
    np.testing.assert_array_equal(batch.inputs_BL, rows(train, 44, 48)[:, :-1])


@pytest.mark.parametrize("used", [0, 1, 7])
def test_resuming_gives_what_would_have_come(used):
    train, sharding = _train_data(), _sharding(P("data"))
    whole = data.batches(train, start=0, sharding=sharding)
    position = 0
    for batch in itertools.islice(whole, used):
        position = batch.position
    # Another process, another mesh: a new object, another sharding.
    resumed = data.batches(_train_data(), start=position, sharding=_sharding(P(None, "model")))
    for expected, got in itertools.islice(zip(whole, resumed, strict=True), 4):
        np.testing.assert_array_equal(got.inputs_BL, expected.inputs_BL)
        np.testing.assert_array_equal(got.targets_BL, expected.targets_BL)
        assert got.position == expected.position
    whole.close()
    resumed.close()


def test_resuming_with_another_batch_size_goes_on_where_it_was():
    batches = data.batches(_train_data(batch_size=4), start=3, sharding=_sharding(P("data")))
    np.testing.assert_array_equal(next(batches).inputs_BL, _train_data().rows(3, 7)[:, :-1])
    batches.close()


# The thread.


def test_the_thread_ends_with_the_generator():
    batches = data.batches(_train_data(), start=0, sharding=_sharding(P("data")))
    assert _threads() == []  # none before the first batch
    next(batches)
    assert len(_threads()) == 1
    batches.close()
    assert _threads() == []


def test_the_thread_ends_when_the_generator_is_dropped():
    for _ in data.batches(_train_data(), start=0, sharding=_sharding(P("data"))):
        break
    assert _threads() == []


def test_batches_are_built_ahead_but_not_without_bound(monkeypatch):
    built = []
    monkeypatch.setattr(
        data, "_train_batch", lambda data, sharding, position: built.append(position)
    )
    batches = data.batches(_train_data(), start=0, sharding=_sharding(P("data")))
    for _ in range(3):
        next(batches)
    batches.close()  # waits for what is under way
    assert built == [0, 8, 16, 24, 32]


def test_exceptions_of_the_thread_are_raised_here(monkeypatch):
    rows = TrainData.rows

    def failing(self, start, stop):
        if start >= 16:
            raise OSError("the disk is gone")
        return rows(self, start, stop)

    monkeypatch.setattr(TrainData, "rows", failing)
    batches = data.batches(_train_data(), start=0, sharding=_sharding(P("data")))
    assert [next(batches).position for _ in range(2)] == [8, 16]
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
    assert _threads() == []


# The held-out part.


def test_held_out_by_hand():
    # 6 bytes, so 5 targets; L=2 gives 3 windows, B=2 gives 2 batches.
    first, second = data.held_out_batches(
        _corpus(held_out=6), batch_size=2, seq_len=2, sharding=_sharding(P())
    )
    np.testing.assert_array_equal(first.inputs_BL, [[1, 2], [3, 4]])
    np.testing.assert_array_equal(first.targets_BL, [[2, 3], [4, 5]])
    np.testing.assert_array_equal(first.mask_BL, [[True, True], [True, True]])
    np.testing.assert_array_equal(second.inputs_BL[0, 0], 5)
    np.testing.assert_array_equal(second.targets_BL, [[6, 0], [0, 0]])
    np.testing.assert_array_equal(second.mask_BL, [[True, False], [False, False]])


@hypothesis.given(st.integers(2, 150), st.sampled_from([4, 8]), st.sampled_from([2, 6, 16]))
def test_every_held_out_byte_is_a_target_once(size, batch_size, seq_len):
    sharding = _sharding(P("data", "model"))
    targets = []
    for batch in data.held_out_batches(
        _corpus(held_out=size), batch_size=batch_size, seq_len=seq_len, sharding=sharding
    ):
        inputs, target, mask = map(np.asarray, batch)
        assert all(array.sharding == sharding for array in batch)
        assert (inputs.dtype, target.dtype, mask.dtype) == (np.int32, np.int32, np.bool_)
        np.testing.assert_array_equal(inputs[mask] + 1, target[mask])
        assert mask[0, 0]  # no batch is all padding
        targets += target[mask].tolist()
    assert targets == list(range(2, size + 1))


# Refusals.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, r"must be positive; got batch_size=0, seq_len=4"),
        ({"seq_len": -1}, r"must be positive; got batch_size=8, seq_len=-1"),
        ({"seed": -1}, r"seed must not be negative; got seed=-1"),
        ({"seq_len": 100}, r"fill one window .*got training bytes=100, seq_len=100; use a smaller"),
    ],
)
def test_refuses_sizes(change, message):
    with pytest.raises(ValueError, match=message):
        _train_data(**change)


def test_the_shortest_corpus_is_one_window():
    train = _train_data(seq_len=99)
    assert train.num_windows == 1
    np.testing.assert_array_equal(train.rows(5, 7), [np.arange(1, 101)] * 2)


def test_refuses_rows_and_positions_out_of_range():
    train = _train_data()
    for start, stop in [(-1, 2), (3, 2)]:
        with pytest.raises(ValueError, match=f"start <= stop; got start={start}, stop={stop}"):
            train.rows(start, stop)
    with pytest.raises(ValueError, match="start must not be negative; got start=-8 sequences"):
        data.batches(train, start=-8, sharding=_sharding(P()))


def test_refuses_batches_that_do_not_divide():
    """At the call, not with the first batch."""
    message = r"divide by the mesh axes .*got batch_size=6, seq_len=4, spec=.*'data': 4, 'model': 2"
    with pytest.raises(ValueError, match=message):
        data.batches(_train_data(batch_size=6), start=0, sharding=_sharding(P("data")))
    with pytest.raises(ValueError, match=message):
        data.held_out_batches(_corpus(), batch_size=6, seq_len=4, sharding=_sharding(P("data")))
    with pytest.raises(ValueError, match="must be positive; got batch_size=8, seq_len=0"):
        data.held_out_batches(_corpus(), batch_size=8, seq_len=0, sharding=_sharding(P("data")))
