"""Compress: a copy in 8 or 4 bits waits for backward in place of the storage.

Lossy, so only done when asked for, and a compressed value never feeds a replay. Writing and reading the copy each move
the storage and the copy through memory once.
"""

from __future__ import annotations

from memopt.planner.actions.site import Site, resident
from memopt.planner.problem import Choice
from memopt.planner.values import Action

# Bits per element, scales included: one 32-bit scale for a block of 256 codes of 8 bits, or of 64 codes of 4 bits.
FORMAT_BITS = {"8bit": 8 + 32 / 256, "4bit": 4 + 32 / 64}


def compressed_bytes(bytes: int, itemsize: int, format: str) -> int:
    """Bytes of the copy of a storage whose elements have ``itemsize`` bytes."""
    return int(bytes / itemsize * FORMAT_BITS[format] / 8)


def choices(site: Site) -> list[Choice]:
    """One choice for each format that is smaller than the storage's own elements."""
    found = []
    for format in FORMAT_BITS:
        small = compressed_bytes(site.bytes, site.itemsize, format)
        if site.itemsize < 2 or small >= site.bytes:
            continue
        seconds = 2 * site.rates.seconds(0, site.bytes + small)
        spans = resident(site.bytes, (site.birth, site.forward_end), (site.first_need, site.death))
        spans += ((site.birth, site.death, small),)
        found.append(Choice(-1, Action.COMPRESS, format, spans, small, 0, 0.0, seconds, (), False))
    return found
