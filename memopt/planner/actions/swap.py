"""Swap: the bytes leave for the host or the disk after forward and come back before backward needs them.

With overlapped copies they are gone by the end of the next block's forward and return from the beginning of the next
block's backward on, at no cost as long as the link keeps up (the link's own constraints see to that). Without overlap
the copy holds up the step for bytes / bandwidth each way.
"""

from __future__ import annotations

from memopt.planner.actions.site import Site, resident
from memopt.planner.problem import Choice
from memopt.planner.values import Action


def choices(site: Site) -> list[Choice]:
    """Possible wherever the hardware has a tier to swap to."""
    rates = site.rates
    if rates.tier == "none":
        return []
    if rates.overlap:
        leaves, returns, seconds = max(site.forward_end, site.leave), min(site.arrive, site.first_need), 0.0
    else:
        leaves, returns = site.forward_end, site.first_need
        seconds = site.bytes / rates.swap_out_bytes_per_second + site.bytes / rates.swap_in_bytes_per_second
    spans = resident(site.bytes, (site.birth, leaves), (returns, site.death))
    return [Choice(-1, Action.SWAP, None, spans, 0, site.bytes, site.lead_seconds, seconds, (), True)]
