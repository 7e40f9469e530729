"""The families of constraints, one file each; every file here is part of the program through its ``add(program)``."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from memopt.planner.policy.program import Program

__all__ = ["add_all"]


def add_all(program: Program) -> None:
    """Adds every family, in the order of their names."""
    for name in sorted(module.name for module in iter_modules(__path__)):
        import_module(f"{__name__}.{name}").add(program)
