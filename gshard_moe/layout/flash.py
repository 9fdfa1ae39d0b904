"""What the attention kernel asks of a layout: whole sequences, and heads with those they look at.

N query heads, J key/value heads, L tokens, D head width.
"""

from collections.abc import Callable, Collection, Mapping

# The axes of more than one device that a dim of a role is split over.
AxesOf = Callable[[str, str], tuple[str, ...]]
# The kernel's smallest block of a sequence, and the widest head that its blocks leave room for.
BLOCK = 128
WIDEST = 256


def faults(axes_of: AxesOf, axes: Collection[str], sizes: Mapping[str, int]) -> list[str]:
    """Returns why the kernel cannot run under a layout, each message with its key.

    Args:
      axes_of: of the layout.
      axes: of the mesh, those of more than one device.
      sizes: of N, J, L and D, over all devices.
    """
    found = []

    def require(key: str, holds: bool, message: str) -> None:
        if not holds:
            found.append(f'{key}: with compute.attention = "flash" {message}')

    message = f"L must be a multiple of {BLOCK}; got L={sizes['L']}"
    require("compute.attention", sizes["L"] % BLOCK == 0, message)
    message = f"D must be at most {WIDEST}; got D={sizes['D']}"
    require("compute.attention", sizes["D"] <= WIDEST, message)
    for role in ("queries", "keys_values"):
        for letter in ("L", "D"):
            split = axes_of(role, letter)
            message = f"{letter} must be whole; got {letter}/{'/'.join(split)}"
            require(f"layout.{role}", not split, message)
    batch, heads = axes_of("queries", "B"), axes_of("queries", "N")
    split = axes_of("keys_values", "B")
    message = f"B must be split as that of queries; got {list(split)}, queries {list(batch)}"
    require("layout.keys_values", split == batch, message)
    split = axes_of("keys_values", "J")
    require(
        "layout.keys_values",
        split == heads or (sizes["J"] == 1 and not split),
        "J must be split as the N of queries, or be 1 and whole; "
        f"got J={sizes['J']} over {list(split)}, N over {list(heads)}",
    )
    # Over another axis all would be computed again, and gradients summed that are whole.
    idle = [axis for axis in axes if axis not in (*batch, *heads)]
    message = f"B or N must be split over every mesh axis; got {idle} of neither"
    require("layout.queries", not idle, message)
    return found
