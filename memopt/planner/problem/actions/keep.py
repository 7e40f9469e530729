"""Keep: the storage stays from its birth until backward has used it."""

from __future__ import annotations

from memopt.planner.problem.actions.site import Site, resident
from memopt.planner.problem.statement import Choice
from memopt.planner.values import Action


def choices(site: Site) -> list[Choice]:
    """Always possible, costs nothing and frees nothing."""
    spans = resident(site.bytes, (site.birth, site.death))
    return [Choice(-1, Action.KEEP, None, spans, site.bytes, 0, 0.0, 0.0, (), True)]
