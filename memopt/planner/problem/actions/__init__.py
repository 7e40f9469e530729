"""What may happen to a saved storage: one file per action, found by its name.

Each file has one function ``choices(site)`` that returns the ways of doing the action at that site: usually one, none
where the action is impossible or saves nothing, several where there are formats.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from memopt.planner.problem.actions.site import Site, resident
from memopt.planner.problem.statement import Choice
from memopt.planner.values import Action

__all__ = ["Site", "choices_at", "resident"]

_NAMES = frozenset(module.name for module in iter_modules(__path__)) - {"site"}


def choices_at(site: Site, actions: frozenset[Action]) -> list[Choice]:
    """Every choice of the given actions at a site, keeping first; a choice that frees nothing is left out."""
    found: list[Choice] = []
    for action in Action:
        if action in actions and action.value in _NAMES:
            found += import_module(f"{__name__}.{action.value}").choices(site)
    kept = [choice for choice in found if choice.action is Action.KEEP]
    return [choice for choice in found if choice in kept or all(choice.spans != other.spans for other in kept)]
