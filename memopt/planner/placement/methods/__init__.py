"""The methods of the staged driver, one file each: a file here that defines ``METHOD`` is found by name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from functools import cache

from memopt.planner.placement.task import Method

__all__ = ["all_methods", "choose_methods"]


@cache
def all_methods() -> dict[str, Method]:
    """Every method by name, in the order in which they run."""
    modules = (importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__))
    methods: list[Method] = [module.METHOD for module in modules]
    return {method.name: method for method in sorted(methods, key=lambda method: method.rank)}


def choose_methods(names: Sequence[str] | None) -> list[Method]:
    """The methods asked for, in their order; by default those that need nothing but what is installed.

    Raises:
        ValueError: no name, an unknown name, or a method whose package is not installed.
    """
    known = all_methods()
    if names is None:
        present = {name for name, method in known.items() if method.missing() is None}
        return [m for m in known.values() if m.default and m.name in present and m.stands_in_for not in present]
    if isinstance(names, str) or not names:
        raise ValueError(f"methods is {names!r}, expected a list out of {', '.join(known)}")
    for name in names:
        if name not in known:
            raise ValueError(f"methods names {name!r}; known are {', '.join(known)}")
        if (package := known[name].missing()) is not None:
            raise ValueError(f"method {name!r} needs the package {package}: pip install {package}")
    return [method for method in known.values() if method.name in names]
