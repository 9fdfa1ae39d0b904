"""What the dispatch `ragged` asks of a layout: that a device has whole experts, or whole slices."""

from collections.abc import Callable

# The axes of more than one device that a dim of a role is split over, where it is used.
AxesOf = Callable[[str, str], tuple[str, ...]]


def faults(axes_of: AxesOf) -> list[str]:
    """Returns why rows cannot be computed under a layout, each message with its key.

    Each device sorts its own tokens by expert, so it must have every expert (stored anywhere, if it
    is gathered for its use); an expert's hidden dim alone may be split.
    """
    found = []

    def require(key: str, holds: bool, message: str) -> None:
        if not holds:
            found.append(f'layout.{key}: with compute.dispatch = "ragged" {message}')

    for role in ("expert_in", "expert_out"):
        split = axes_of(role, "E")
        axes = "/".join(split)
        require(
            role,
            not split,
            f"E must be whole where it is used; got E/{axes}; add {', '.join(map(repr, split))} to "
            'layout.gather, or use the dispatch "gather"',
        )
        split = axes_of(role, "M")
        axes = "/".join(split)
        require(role, not split, f"M must be whole where it is used; got M/{axes}")
    hidden = axes_of("rows_hidden", "H")
    for role in ("expert_in", "expert_out"):
        split = axes_of(role, "H")
        require(
            "rows_hidden",
            split == hidden,
            f"H must be split as {role}'s; got {list(hidden)}, {role} {list(split)}",
        )
    groups, split = axes_of("groups", "G"), axes_of("rows", "R")
    message = f"R must be split as the G of groups; got {list(split)}, groups {list(groups)}"
    require("rows", split == groups, message)
    message = f"R must be split as that of rows; got {list(axes_of('rows_hidden', 'R'))}"
    require("rows_hidden", axes_of("rows_hidden", "R") == split, message)
    for role, letter in (("groups", "S"), ("rows", "M")):
        split = axes_of(role, letter)
        require(role, not split, f"{letter} must be whole; got {letter}/{'/'.join(split)}")
    return found
