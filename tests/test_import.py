"""Importing the package touches no device."""

import os
import pathlib
import subprocess
import sys

_ROOT = pathlib.Path(__file__).parent.parent


def _run(code: str, *, platforms: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=_ROOT,
        env=os.environ | {"JAX_PLATFORMS": platforms},
        capture_output=True,
        text=True,
        timeout=120,
    )


# Every public name is asked for, so that one which is imported only when used counts too.
_IMPORT = """
import gshard_moe
assert gshard_moe.__all__
for name in gshard_moe.__all__:
    getattr(gshard_moe, name)
print("imported")
"""


def test_import_starts_no_backend():
    done = _run(_IMPORT, platforms="nonexistent")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "imported\n"


def test_the_platform_of_that_test_does_refuse_to_start():
    done = _run("import jax; jax.devices()", platforms="nonexistent")
    assert done.returncode != 0
    assert "nonexistent" in done.stderr


def test_the_platform_of_the_tests_does_start():
    done = _run("import jax; print(jax.default_backend())", platforms="cpu")
    assert (done.returncode, done.stdout) == (0, "cpu\n"), done.stderr
