"""Compress: a copy in 8 or 4 bits, or a mask's single bits, waits for backward in place of the storage.

Codes are lossy, so this is only done when asked for, and a compressed value never feeds a replay. Writing and reading
the copy each move the storage and the copy through memory once. By seconds alone 4 bits would always be taken before 8:
their seconds count double here, so that they are taken where 8 bits do not fit.
"""

from __future__ import annotations

from memopt.planner.compression import compressed_bytes, formats_for
from memopt.planner.problem.actions.site import Site, resident
from memopt.planner.problem.statement import Choice
from memopt.planner.values import Action

_COUNTED = {"4bit": 2}


def choices(site: Site) -> list[Choice]:
    """One choice for each format that the storage's element type allows."""
    found = []
    for format in formats_for(site.dtype):
        small = compressed_bytes(site.bytes, site.dtype, format)
        seconds = 2 * site.rates.seconds(0, site.bytes + small) * _COUNTED.get(format, 1)
        spans = resident(site.bytes, (site.birth, site.forward_end), (site.first_need, site.death))
        spans += ((site.birth, site.death, small),)
        found.append(Choice(-1, Action.COMPRESS, format, spans, small, 0, 0.0, seconds, (), False))
    return found
