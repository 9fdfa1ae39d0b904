"""Runs a notebook from its text, and writes its pair with what it printed and drew.

python tests/run_notebook.py notebooks/02_timeline.py            # runs it, or fails
python tests/run_notebook.py notebooks/02_timeline.py --write    # and writes the .ipynb beside it
"""

import pathlib
import sys

import jupytext
import nbclient
import nbformat

TIMEOUT_S = 300


def run(path: pathlib.Path) -> nbformat.NotebookNode:
    """Executes every cell; raises `CellExecutionError` where one does not end well."""
    notebook = jupytext.read(path)
    # A cell's name would be drawn at random; times of its running tell nobody anything.
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    nbclient.NotebookClient(notebook, timeout=TIMEOUT_S, record_timing=False).execute()
    notebook.metadata.pop("language_info", None)
    return notebook


def main() -> None:
    path = pathlib.Path(sys.argv[1])
    notebook = run(path)
    if "--write" in sys.argv:
        nbformat.write(notebook, path.with_suffix(".ipynb"))


if __name__ == "__main__":
    main()
