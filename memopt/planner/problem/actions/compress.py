"""Compress: a copy in 8 or 4 bits, or a mask's single bits, waits for backward in place of the storage.

Codes are lossy, so this is only done when asked for, and a compressed value never feeds a replay. Writing and reading
the copy each move the storage and the copy through memory once.
"""

from __future__ import annotations

from memopt.planner.compression import compressed_bytes, formats_for
from memopt.planner.problem.actions.site import Site, resident
from memopt.planner.problem.statement import Choice
from memopt.planner.values import Action


def choices(site: Site) -> list[Choice]:
    """One choice for each format that the storage's element type allows."""
    found = []
    for format in formats_for(site.dtype):
        small = compressed_bytes(site.bytes, site.dtype, format)
        seconds = 2 * site.rates.seconds(0, site.bytes + small)
        spans = resident(site.bytes, (site.birth, site.forward_end), (site.first_need, site.death))
        spans += ((site.birth, site.death, small),)
        found.append(Choice(-1, Action.COMPRESS, format, spans, small, 0, 0.0, seconds, (), False))
    return found
