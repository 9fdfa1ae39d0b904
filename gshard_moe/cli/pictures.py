"""Timelines as files: pictures, a page, a trace."""

import pathlib

from gshard_moe import timeline
from gshard_moe.train.study import Study

_ENDINGS = (".svg", ".png", ".html", ".json")


class PictureError(ValueError):
    """Says what about a picture's file cannot be."""


def check(path: pathlib.Path) -> None:
    """Refuses, before anything is compiled, a file that could not be written afterwards."""
    if path.suffix not in _ENDINGS:
        raise PictureError(
            f"--picture: must end in one of {', '.join(_ENDINGS)}; got {str(path)!r}"
        )
    if not path.parent.is_dir():
        raise PictureError(f"--picture: its folder must exist; got {str(path)!r}")
    if path.is_dir():
        raise PictureError(f"--picture: must be a file; got the folder {str(path)!r}")


def check_folder(path: pathlib.Path) -> None:
    """Refuses, before anything is compiled, what can be no folder."""
    for part in (path, *path.parents):
        if part.exists() and not part.is_dir():
            raise PictureError(f"--dump: must be a folder, or new; got the file {str(part)!r}")


def write(path: pathlib.Path, found: Study) -> None:
    """Draws the program with overlap forbidden and as it was compiled (link model `lhs`)."""
    if not found.programs:
        raise PictureError(f"--picture: the program must fit the memory; {path} is not written")
    program = found.programs["lhs"]
    drawn = {"overlap forbidden": timeline.without_overlap(program), "as compiled": program}
    if path.suffix == ".html":
        path.write_text(timeline.page(drawn), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(timeline.trace(drawn), encoding="utf-8")
    else:
        _draw(path, drawn)


def _draw(path: pathlib.Path, drawn: dict[str, timeline.Program]) -> None:
    """Writes the same bytes each time."""
    import matplotlib  # here, so that no other verb waits for it

    from gshard_moe.timeline import draw

    with matplotlib.rc_context({"svg.hashsalt": "gshard_moe"}):
        metadata = {"Date": None} if path.suffix == ".svg" else None
        draw.figure(drawn).savefig(path, metadata=metadata)
