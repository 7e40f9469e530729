"""Recompute: freed after forward, written again by replaying operations when backward needs it."""

from __future__ import annotations

from memopt.planner.problem.actions.site import Site, resident
from memopt.planner.problem.statement import Choice
from memopt.planner.values import Action


def choices(site: Site) -> list[Choice]:
    """Possible where the operations that write the storage can be replayed from what the block can still read.

    It is back from its first need on, or from the first replay that reads it (``early.py`` counts those bytes).
    """
    if site.replay_seconds is None:
        return []
    spans = resident(site.bytes, (site.birth, site.forward_end), (site.first_need, site.death))
    return [Choice(-1, Action.RECOMPUTE, None, spans, 0, 0, 0.0, site.replay_seconds, site.replay_needs, True)]
