"""Sizes and times as people read them."""


def shown_bytes(count: int | float) -> str:
    """Spells bytes in binary units."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:,.4g} {unit}"
        size /= 1024
    return f"{size:,.2f} TiB"


def shown_seconds(seconds: int | float) -> str:
    """Spells seconds, milliseconds or microseconds."""
    for unit, scale in (("s", 1), ("ms", 1e3), ("us", 1e6)):
        if seconds * scale >= 1 or unit == "us":
            return f"{seconds * scale:,.4g} {unit}"
    raise AssertionError
