"""Every notebook runs from its first cell to its assert, and its pair is of the same cells."""

import pathlib
import subprocess
import sys

import jupytext
import nbformat
import pytest

_ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((_ROOT / "notebooks").glob("*.py"))


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: pathlib.Path):
    """In a process of its own: the kernel is one, and its libraries warn."""
    runner = _ROOT / "tests" / "run_notebook.py"
    done = subprocess.run([sys.executable, runner, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_pair_is_of_the_same_cells_and_was_run(path: pathlib.Path):
    """`make notebooks` writes the pair."""
    text = jupytext.read(path)
    pair = nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    assert [(c.cell_type, c.source) for c in pair.cells] == [
        (c.cell_type, c.source) for c in text.cells
    ]
    code = [cell for cell in pair.cells if cell.cell_type == "code"]
    assert "assert" in code[-1].source
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
