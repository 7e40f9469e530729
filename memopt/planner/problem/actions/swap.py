"""Swap: the bytes leave for the host or the disk after forward and come back before backward needs them.

With overlapped copies they are gone by the end of the next block's forward and return from the beginning of the next
block's backward on, at no cost as long as the link keeps up (the link's own constraints see to that). Without overlap
the copy holds up the step for bytes / bandwidth each way.

Of a large storage a share may leave. The rest moves to a smaller buffer when forward lets go of the storage and back
when backward needs it, so that around these moments both are there.
"""

from __future__ import annotations

from memopt.planner.problem.actions.site import Site, resident
from memopt.planner.problem.statement import Choice
from memopt.planner.values import Action, moved_bytes

SHARES = (1.0, 0.75, 0.5, 0.25)


def choices(site: Site) -> list[Choice]:
    """Possible wherever the hardware has a tier to swap to and there is time in between."""
    rates = site.rates
    if rates.tier == "none":
        return []
    leaves, returns = site.forward_end, site.first_need
    if rates.overlap:
        leaves, returns = max(leaves, site.leave), min(site.arrive, returns)
    if leaves >= returns:
        return []
    found = []
    for share in SHARES if site.divisible else (1.0,):
        moved = moved_bytes(site.bytes, share)
        rest = site.bytes - moved
        seconds = moved / rates.swap_out_bytes_per_second + moved / rates.swap_in_bytes_per_second
        spans = resident(site.bytes, (site.birth, leaves), (returns, site.death))
        if rest:
            spans += ((site.last_use, site.first_need + 1, rest),)
        found.append(
            Choice(
                -1,
                Action.SWAP,
                None,
                spans,
                rest,
                moved,
                site.lead_seconds,
                0.0 if rates.overlap else seconds,
                (),
                True,
                share,
            )
        )
    return found
