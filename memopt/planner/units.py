"""Sizes as people write them: ``"24GiB"`` to bytes, bytes to ``"24.0 GiB"``."""

from __future__ import annotations

import re

_BINARY = {"B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_DECIMAL = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*([A-Za-z]*)\s*")


class BudgetError(ValueError):
    """A budget that cannot be read, or that no plan could ever meet because the weights alone are larger."""


def parse_bytes(size: int | str, argument: str = "budget") -> int:
    """Read a size: bytes as an integer, or text such as ``"24GiB"``, ``"1.5 MiB"``, ``"80GB"`` or ``"4096"``.

    KiB, MiB, GiB, TiB are powers of 1024; KB, MB, GB, TB powers of 1000. Case does not matter.

    Args:
        size: what to read.
        argument: the name that an error message gives the value.

    Returns:
        Bytes, at least 1.

    Raises:
        BudgetError: the text is no size, or the size is below one byte.
        TypeError: neither an integer nor text.
    """
    if isinstance(size, bool) or not isinstance(size, int | str):
        raise TypeError(f"{argument} must be an integer of bytes or text such as '24GiB', not {type(size).__name__}")
    if isinstance(size, int):
        count = size
    else:
        match = _PATTERN.fullmatch(size)
        unit = (match.group(2) or "B").upper() if match else ""
        factor = _BINARY.get(unit) or _DECIMAL.get(unit)
        if match is None or factor is None:
            raise BudgetError(
                f"{argument} {size!r} is not a size; write a number with a unit out of "
                f"B, KiB, MiB, GiB, TiB, KB, MB, GB, TB, for example '24GiB'"
            )
        count = int(min(float(match.group(1)) * factor, float(2**62)))
    if count < 1:
        raise BudgetError(f"{argument} {size!r} is {count} bytes; it must be at least 1")
    return count


def format_bytes(count: int | float) -> str:
    """Print ``count`` bytes with a binary unit and one decimal: ``"512 B"``, ``"1.5 MiB"``, ``"24.0 GiB"``."""
    size = float(count)
    if abs(size) < 1024:
        return f"{size:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        size /= 1024
        if abs(size) < 1024:
            return f"{size:.1f} {unit}"
    return f"{size / 1024:.1f} TiB"
