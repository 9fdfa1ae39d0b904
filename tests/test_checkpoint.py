"""Checkpoints: whole, or not there."""

import contextlib
import json
import re
import resource
import shutil
import subprocess
import sys
import textwrap
import time

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gshard_moe.train.checkpoint import CheckpointError, Checkpoints, newest

LAYOUTS = ("expert", "expert_model", "fsdp", "one device")


def tree(seed: int = 0, card: str = "expert") -> dict:
    """Makes a state of several dtypes on a layout, or on one device."""
    if card == "one device":
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    else:
        sharding = cases.layout(card).sharding("expert_in")
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(8, 16, 32)).astype(np.float32)
    weights[0, 0, :2] = np.nan, np.inf
    return {
        "expert": jax.device_put(weights, sharding),
        "half": jax.device_put(jnp.asarray(weights, jnp.bfloat16), sharding),
        "nested": ({"count": jnp.asarray(3, jnp.int32)}, jnp.zeros((1, 4))),
        "bits": jax.random.key_data(jax.random.key(seed)),  # uint32
        "key": jax.random.key(seed),
    }


def abstract(state: dict) -> dict:
    """Returns what to restore, where."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )


def assert_equal(got: dict, want: dict) -> None:
    def compare(a: jax.Array, b: jax.Array) -> None:
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()

    jax.tree.map(compare, got, want)


def save(folder, *steps: int, keep: int = 3) -> None:
    with Checkpoints(folder, keep=keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, tree(step), {"position": step * 10})


def restore(folder, want: dict, keep: int | None = 3) -> tuple:
    said: list[str] = []
    with Checkpoints(folder, keep=keep) as checkpoints:
        return checkpoints.restore(abstract(want), say=said.append), said


def test_nothing_there(tmp_path):
    assert restore(tmp_path / "none", tree()) == (None, [])
    assert newest(tmp_path / "none") is None


@pytest.mark.parametrize("card", LAYOUTS)
def test_what_was_saved_comes_back_to_the_bit_on_another_mesh(card, tmp_path):
    save(tmp_path, 5)
    want = tree(5, card)
    restored, said = restore(tmp_path, want)
    assert (restored.step, restored.extra, said) == (5, {"position": 50}, [])
    assert_equal(restored.state, want)
    jax.tree.map(lambda a, b: None if a.sharding == b.sharding else 1 / 0, restored.state, want)


def test_the_newest_are_kept(tmp_path):
    save(tmp_path, 1, 2, 3, 4, keep=2)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.steps() == [3, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("00000003", "00000003.json", "00000004", "00000004.json")
    ]
    assert newest(tmp_path).endswith("00000004")


def test_the_state_may_be_overwritten_once_save_returns(tmp_path):
    state = tree(1)
    want = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), state)
    zero = jax.jit(lambda tree: jax.tree.map(jnp.zeros_like, tree), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        jax.block_until_ready(zero(state))
    assert_equal(restore(tmp_path, want)[0].state, want)


def flip(file, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 4
    file.write_bytes(data)


def damage_flip(path, file):
    flip(file, file.stat().st_size // 3)


def damage_cut(path, file):
    file.write_bytes(file.read_bytes()[:-1])


def damage_missing(path, file):
    file.unlink()


def damage_manifest(path, file):
    path.with_suffix(".json").write_text('{"format": ')


def damage_foreign(path, file):
    manifest = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps(manifest | {"format": "other"}))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damage_flip, "is not as it was written"),
        (damage_cut, "is not as it was written"),
        (damage_missing, "is missing"),
        (damage_manifest, "its manifest cannot be read"),
        (damage_foreign, "it is not ours; got format='other'"),
    ],
)
def test_a_damaged_checkpoint_is_refused_aloud_and_the_older_one_used(damage, reason, tmp_path):
    save(tmp_path, 1, 2)
    files = [path for path in (tmp_path / "00000002").rglob("*") if path.is_file()]
    for index in range(len(files)):
        folder = tmp_path / f"copy{index}"
        for name in ("00000001", "00000002"):
            shutil.copytree(tmp_path / name, folder / name)
            shutil.copy(tmp_path / f"{name}.json", folder)
        path = folder / "00000002"
        file = path / files[index].relative_to(tmp_path / "00000002")
        damage(path, file)
        restored, said = restore(folder, tree(1))
        assert restored.step == 1
        assert len(said) == 1 and reason in said[0] and "trying the one before" in said[0]
        assert_equal(restored.state, tree(1))
        assert (folder / "refused" / "00000002").is_dir()
        if damage in (damage_manifest, damage_foreign):
            break


def test_a_flipped_byte_anywhere_is_refused(tmp_path):
    """Orbax alone would return other numbers; `extra` is as dear as the arrays."""
    save(tmp_path, 1)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    rng = np.random.default_rng(0)
    with Checkpoints(tmp_path, keep=None) as checkpoints:
        for file in files:
            whole = file.read_bytes()
            for position in rng.choice(len(whole), min(len(whole), 12), replace=False):
                flip(file, position)
                with pytest.raises(CheckpointError, match="00000001: it"):
                    checkpoints.restore(abstract(tree(1)), say=lambda _: None)
                file.write_bytes(whole)
        restored = checkpoints.restore(abstract(tree(1)), say=pytest.fail)
    assert_equal(restored.state, tree(1))


def test_what_is_not_ours_is_refused_aloud_and_never_removed(tmp_path):
    theirs = tmp_path / "00000007"
    theirs.mkdir()
    (theirs / "weights").write_text("theirs")
    with pytest.raises(CheckpointError, match="00000007: it is not ours, or not whole: there is"):
        restore(tmp_path, tree(1))
    save(tmp_path, 1)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError, match="already exists"):
            checkpoints.save(7, tree(1), {})
    assert (theirs / "weights").read_text() == "theirs"
    restored, said = restore(tmp_path, tree(1))
    assert restored.step == 1 and "00000007: it is not ours" in said[0]
    assert (tmp_path / "refused" / "00000007" / "weights").read_text() == "theirs"


def test_extra_is_as_it_was_when_save_was_called(tmp_path):
    extra = {"position": 1}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree(1), extra)
        extra["position"] = 2
    assert restore(tmp_path, tree(1))[0].extra == {"position": 1}


def test_none_to_keep_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep must be positive; got keep=0"):
        Checkpoints(tmp_path, keep=0)


def test_reading_only_moves_nothing(tmp_path):
    save(tmp_path, 1, 2)
    damage_manifest(tmp_path / "00000002", None)
    before = sorted(tmp_path.rglob("*"))
    assert restore(tmp_path, tree(1), keep=None)[0].step == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_another_model_is_refused_with_both_shapes(tmp_path):
    save(tmp_path, 1)
    other = tree(1)
    other["expert"] = other["expert"][:, :8]
    other["more"] = jnp.zeros(2)
    with pytest.raises(
        CheckpointError,
        match=re.escape("expert must be [8, 8, 32, 'float32']; got [8, 16, 32, 'float32']"),
    ):
        restore(tmp_path, other)
    assert (tmp_path / "00000001").is_dir()


def test_unfinished_saves_are_cleared_away_and_finished_ones_stay(tmp_path):
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "00000001", tmp_path / "00000002")  # killed before its manifest
    (tmp_path / "00000002.json.partial").write_text("{")
    (tmp_path / "00000003.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    restored, said = restore(tmp_path, tree(1))
    assert (restored.step, said) == (1, [])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("00000001", "00000001.json", "notes.txt")
    ]


def test_killed_at_any_moment_the_one_before_stays(tmp_path):
    """One process after another goes on where the one before was killed."""
    script = textwrap.dedent("""
        import sys, jax.numpy as jnp
        from gshard_moe.train.checkpoint import Checkpoints
        with Checkpoints(sys.argv[1], keep=1) as checkpoints:
            first = (checkpoints.latest() or 0) + 1
            print("begun", flush=True)
            for step in range(first, first + 100000):
                checkpoints.save(step, {"x": jnp.full((300, 300), step)}, {"n": step})
    """)
    rng = np.random.default_rng(0)
    want = {"x": jnp.zeros((300, 300), jnp.int32)}
    before = 0
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        process.stdout.readline()
        while not list(tmp_path.glob("*.json")):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.wait()
        process.stdout.close()
        restored, said = restore(tmp_path, want)
        assert said == [] and restored.step >= before
        assert (np.asarray(restored.state["x"]) == restored.step).all()
        assert restored.extra == {"n": restored.step}
        before = restored.step
    # Of what was killed nothing is left.
    assert len(list(tmp_path.iterdir())) == 2 * len(list(tmp_path.glob("*.json")))
    assert before > 1


@contextlib.contextmanager
def full_disk(room: int):
    """Makes writes past `room` bytes of a file fail, as the system does it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("fails", ["arrays", "manifest"])
@pytest.mark.parametrize("surfaces", ["save", "wait", "close"])
def test_a_full_disk_is_named_at_the_next_call_and_harms_nothing(fails, surfaces, tmp_path):
    # One array of 40 KB: of several that fail at once, tensorstore's futures outlive Orbax's loop
    # and complain of it in their threads.
    state = {"x": jax.random.normal(jax.random.key(0), (10_000,))}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, {})
    checkpoints = Checkpoints(tmp_path, keep=1)
    message = r"step 2 could not be written: .*File too large.*00000001 is good"
    with full_disk(4_000 if fails == "arrays" else 100_000):
        extra = {} if fails == "arrays" else {"long": "x" * 100_000}
        checkpoints.save(2, state, extra)
        with pytest.raises(CheckpointError, match=message):
            if surfaces == "save":
                checkpoints.save(3, state, {})
            else:
                getattr(checkpoints, surfaces)()
    # The failed save has given its space back, the one before is whole, the step is still free.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000001", "00000001.json"]
    checkpoints.close()
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        restored = checkpoints.restore(abstract(state), say=pytest.fail)
        assert restored.step == 1
        assert_equal(restored.state, state)
        checkpoints.save(2, state, {})
        checkpoints.wait()
        assert checkpoints.steps() == [2]


def test_a_failed_save_can_be_tried_again_at_once(tmp_path):
    state = {"x": jax.random.normal(jax.random.key(0), (10_000,))}
    with Checkpoints(tmp_path) as checkpoints:
        with full_disk(4_000):
            checkpoints.save(1, state, {})
            with pytest.raises(CheckpointError, match="there is no earlier one"):
                checkpoints.wait()
        checkpoints.save(1, state, {})
        checkpoints.wait()
        assert checkpoints.steps() == [1]


def test_a_failed_save_names_the_good_one(tmp_path):
    save(tmp_path, 1)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError, match=r"step 1 could not .*already exists.*1 is good"):
            checkpoints.save(1, tree(1), {})
        checkpoints.save(2, tree(2), {})
    assert restore(tmp_path, tree(2))[0].step == 2
