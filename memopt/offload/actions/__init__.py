"""What is done with a saved storage: one file per action, found by the action's name."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from memopt.offload.actions.saver import BlockCall, Saver
from memopt.planner.values import StorageAction

__all__ = ["BlockCall", "Saver", "saver"]

_NAMES = frozenset(module.name for module in iter_modules(__path__)) - {"saver"}


def saver(action: StorageAction) -> Saver:
    """The object that carries an action out.

    Raises:
        ValueError: no such action, or it cannot be done with this format or fraction.
    """
    if action.action.value not in _NAMES:
        raise ValueError(f"action {action.action.value!r} is unknown to the runtime; it knows {sorted(_NAMES)}")
    made: Saver = import_module(f"{__name__}.{action.action.value}").make(action)
    return made
