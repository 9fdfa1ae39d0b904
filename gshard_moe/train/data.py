"""The data pipeline: a corpus as an endless, shuffled, random-access list of rows.

The position in the data is one integer, the number of sequences consumed. Row r of the endless list
depends on the corpus, `seq_len`, the seed and r; not on the batch size, the sharding or the number
of processes. So a run resumes exactly, and on another mesh too.

Dimension key: B sequences in the batch, L targets in a sequence. A row is L + 1 bytes: the inputs
are all but its last byte, the targets all but its first.
"""

import collections
import functools
import itertools
from collections.abc import Callable, Generator, Iterator
from concurrent import futures
from typing import NamedTuple

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Bool, Int32, Shaped, UInt8

from gshard_moe.train.corpus import Corpus

# Batches built ahead of the one in use: one would do, the second evens out a slow one.
_BATCHES_AHEAD = 2


class DataError(ValueError):
    """Says which number does not suit the corpus or the mesh."""


class Batch(NamedTuple):
    """A training batch of global arrays.

    Attributes:
      inputs_BL: bytes.
      targets_BL: the byte after each input.
      position: sequences consumed once this batch is; where to resume.
    """

    inputs_BL: Int32[jax.Array, "B L"]
    targets_BL: Int32[jax.Array, "B L"]
    position: int


class EvalBatch(NamedTuple):
    """A held-out batch of global arrays; where the mask is False, inputs and targets are padding.

    Attributes:
      inputs_BL: bytes.
      targets_BL: the byte after each input.
      mask_BL: which targets count.
    """

    inputs_BL: Int32[jax.Array, "B L"]
    targets_BL: Int32[jax.Array, "B L"]
    mask_BL: Bool[jax.Array, "B L"]


class TrainData:
    """The training bytes as windows, shuffled anew in each epoch, without end.

    Window i starts at byte i * seq_len, so every byte but the first is a target once in an epoch;
    at most seq_len - 1 bytes at the end of the corpus fill no window and are never one.

    Attributes:
      batch_size: B.
      seq_len: L.
      num_windows: rows in an epoch. A batch may span two epochs.
    """

    def __init__(self, corpus: Corpus, *, batch_size: int, seq_len: int, seed: int):
        """Cuts the windows and fixes their order.

        Args:
          corpus: its `train` part is used.
          batch_size: B; does not change which row has which index.
          seq_len: L.
          seed: of the shuffle, not negative.
        Raises:
          DataError: if a number is out of its range, or the corpus shorter than one window.
        """
        _check_sizes(batch_size, seq_len)
        if seed < 0:
            raise DataError(f"seed must not be negative; got seed={seed}")
        if corpus.train.size < seq_len + 1:
            raise DataError(
                "the training bytes must fill one window of seq_len + 1; "
                f"got training bytes={corpus.train.size}, seq_len={seq_len}; "
                "use a smaller seq_len or more text"
            )
        self.batch_size = batch_size
        self.seq_len = seq_len
        self._windows = _cut_windows(corpus.train, seq_len)
        self.num_windows = len(self._windows)
        # `repeat` gives each epoch its own shuffle (`reseed_each_epoch`, the default). Only indices
        # pass through grain, at 6 us each; the bytes are gathered in one NumPy call. Below 1,000
        # windows grain is slower, at about 20 ms / num_windows an index (measured, grain 0.2.18).
        self._order = grain.MapDataset.range(self.num_windows).seed(seed).shuffle().repeat()

    def rows(self, start: int, stop: int) -> Int32[np.ndarray, "rows window"]:
        """Returns rows `start` to `stop` (exclusive) of the endless list, seq_len + 1 bytes each.

        Raises:
          DataError: unless 0 <= start <= stop.
        """
        if not 0 <= start <= stop:
            raise DataError(f"rows must have 0 <= start <= stop; got start={start}, stop={stop}")
        indices = np.array([self._order[row] for row in range(start, stop)], np.intp)
        return self._windows[indices].astype(np.int32)


def batches(data: TrainData, *, start: int, sharding: NamedSharding) -> Generator[Batch]:
    """Yields batches without end, built ahead in a thread.

    The thread starts with the first batch asked for and ends when the generator is closed or
    dropped; its exceptions are raised here. A process reads only the rows that its own devices
    need, and each of them once.

    Args:
      data: where the rows come from.
      start: sequences already consumed: 0, or `Batch.position` of the last batch used; it need not
        divide by the batch size.
      sharding: of the `[B, L]` arrays.
    Raises:
      DataError: if `start` is negative, or `[B, L]` does not divide by its mesh axes.
    """
    if start < 0:
        raise DataError(f"start must not be negative; got start={start} sequences")
    _check_sharding(data.batch_size, data.seq_len, sharding)
    return _built_ahead(functools.partial(_train_batch, data, sharding), start, data.batch_size)


def held_out_batches(
    corpus: Corpus, *, batch_size: int, seq_len: int, sharding: NamedSharding
) -> Iterator[EvalBatch]:
    """Yields the held-out bytes in order, each but the first one as a target exactly once.

    Windows do not overlap, so the first target of each has one byte of context. The last window is
    padded, and the last batch is filled up with rows that are all padding: over all batches
    `mask_BL` sums to `corpus.held_out.size - 1`.

    Args:
      corpus: its `held_out` part is used.
      batch_size: B.
      seq_len: L.
      sharding: of the `[B, L]` arrays.
    Raises:
      DataError: if a size is not positive, or `[B, L]` does not divide by its mesh axes.
    """
    _check_sizes(batch_size, seq_len)
    _check_sharding(batch_size, seq_len, sharding)
    return _held_out_batches(corpus.held_out, batch_size, seq_len, sharding)


def _held_out_batches(
    held_out: UInt8[np.ndarray, " _"], batch_size: int, seq_len: int, sharding: NamedSharding
) -> Iterator[EvalBatch]:
    num_targets = held_out.size - 1
    num_batches = -(-num_targets // (batch_size * seq_len))
    padded = np.zeros(num_batches * batch_size * seq_len + 1, np.uint8)
    padded[: held_out.size] = held_out
    windows = _cut_windows(padded, seq_len)
    mask = (np.arange(padded.size - 1) < num_targets).reshape(-1, seq_len)
    shape = (batch_size, seq_len)
    for first in range(0, len(windows), batch_size):
        rows = windows[first : first + batch_size].astype(np.int32)
        mask_BL = mask[first : first + batch_size]
        yield EvalBatch(
            inputs_BL=_global_array(rows[:, :-1].__getitem__, shape, sharding),
            targets_BL=_global_array(rows[:, 1:].__getitem__, shape, sharding),
            mask_BL=_global_array(mask_BL.__getitem__, shape, sharding),
        )


def _train_batch(data: TrainData, sharding: NamedSharding, position: int) -> Batch:
    # JAX asks once for each device and array: without the cache, devices that hold the same rows
    # would read them again, and the targets would read what the inputs have read.
    @functools.cache
    def read(rows: slice) -> Int32[np.ndarray, "rows window"]:
        first, stop, _ = rows.indices(data.batch_size)
        return data.rows(position + first, position + stop)

    shape = (data.batch_size, data.seq_len)
    return Batch(
        inputs_BL=_global_array(lambda rows: read(rows)[:, :-1], shape, sharding),
        targets_BL=_global_array(lambda rows: read(rows)[:, 1:], shape, sharding),
        position=position + data.batch_size,
    )


def _built_ahead(build: Callable[[int], Batch], start: int, batch_size: int) -> Generator[Batch]:
    """Yields `build(start)`, `build(start + batch_size)`, ..., a few of them built ahead."""
    positions = itertools.count(start, batch_size)
    with futures.ThreadPoolExecutor(1, thread_name_prefix="gshard-moe-data") as thread:
        ahead = collections.deque(
            thread.submit(build, next(positions)) for _ in range(_BATCHES_AHEAD)
        )
        while True:
            batch = ahead.popleft().result()
            ahead.append(thread.submit(build, next(positions)))
            yield batch


def _global_array(
    read: Callable[[slice], Shaped[np.ndarray, "rows columns"]],
    shape: tuple[int, int],
    sharding: NamedSharding,
) -> Shaped[jax.Array, "B L"]:
    """Makes a global array from what `read` gives for the rows of this process's devices."""
    return jax.make_array_from_callback(shape, sharding, functools.partial(_read_shard, read))


def _read_shard(
    read: Callable[[slice], Shaped[np.ndarray, "rows columns"]], index: tuple[slice, ...] | None
) -> Shaped[np.ndarray, "_ _"]:
    assert index is not None
    rows, columns = index
    return read(rows)[:, columns]


def _cut_windows(text: UInt8[np.ndarray, " _"], seq_len: int) -> UInt8[np.ndarray, "rows window"]:
    """Returns a view of all windows of seq_len + 1 bytes, of which neighbours share one byte."""
    return np.lib.stride_tricks.sliding_window_view(text, seq_len + 1)[::seq_len]


def _check_sizes(batch_size: int, seq_len: int) -> None:
    if batch_size < 1 or seq_len < 1:
        raise DataError(
            "batch_size and seq_len must be positive; "
            f"got batch_size={batch_size}, seq_len={seq_len}"
        )


def _check_sharding(batch_size: int, seq_len: int, sharding: NamedSharding) -> None:
    try:
        sharding.shard_shape((batch_size, seq_len))
    except ValueError as error:
        raise DataError(
            "a batch must divide by the mesh axes that it is split over; "
            f"got batch_size={batch_size}, seq_len={seq_len}, spec={sharding.spec}, "
            f"mesh={dict(sharding.mesh.shape)}; change the sizes or the mesh"
        ) from error
