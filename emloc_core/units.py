"""Human-readable bytes, seconds and counts."""

import re

from emloc_core.errors import EmlocError

_UNITS = {"": 1, "k": 1, "m": 2, "g": 3, "t": 4}
_LEAST = 1 << 16  # bytes; a smaller number without a unit lacks it by mistake
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """Return a size in bytes: ``24GiB`` (2^30), ``24GB`` (10^9), ``800MB``, ``1.5 TiB``, or a number of bytes.

    Raises:
        EmlocError: it is not a size, or is zero.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise EmlocError(f"{text!r} is not a memory size.", "Write it as 24GiB, 24GB or 800MB.")
    number, unit, binary = match.groups()
    size = int(float(number) * (1024 if binary else 1000) ** (_UNITS[unit.lower()] if unit else 0))
    if not unit and not binary and 0 < size < _LEAST:
        raise EmlocError(f"{text!r} would be {size} bytes of memory.", f"Write the unit: {number}GiB.")
    if (binary and not unit) or size < 1:
        raise EmlocError(f"{text!r} is not a memory size.", "Write it as 24GiB, 24GB or 800MB.")
    return size


def human_bytes(count: float) -> str:
    """Return a number of bytes in a readable unit: ``1.37 GB``."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB" if count < 999.5 else f"{count:,.0f} GB"


def human_seconds(seconds: float) -> str:
    """Return a duration as ``35 ms``, ``4.2 s``, ``42 s``, ``3 min 05 s`` or ``2 h 07 min``."""
    if seconds < 0.0995:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    rounded = round(seconds)
    if rounded < 100:
        return f"{rounded} s"
    if rounded < 3600:
        return f"{rounded // 60} min {rounded % 60:02d} s"
    return f"{rounded // 3600} h {rounded % 3600 // 60:02d} min"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, given in the singular: ``1 row``, ``300 rows``."""
    return f"{number} {noun}{'s' * (number != 1)}"
