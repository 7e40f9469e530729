"""Where swapped storages wait: one file per tier, found by its name."""

from __future__ import annotations

import os
from importlib import import_module
from pkgutil import iter_modules

from memopt.offload.tiers.tier import Slot, Tier, first_bytes

__all__ = ["Slot", "Tier", "first_bytes", "open_tier"]

_NAMES = frozenset(module.name for module in iter_modules(__path__)) - {"tier"}


def open_tier(name: str, folder: str | os.PathLike[str] | None = None, limit_bytes: int | None = None) -> Tier:
    """A tier by name: ``"host"``, ``"disk"``, or ``"none"`` for plans that swap nothing.

    Args:
        name: which tier.
        folder: for the disk tier: where its file is made; by default the folder for temporary files.
        limit_bytes: the most that the tier may hold at once.

    Raises:
        ValueError: no such tier, or a folder that cannot be written to.
    """
    known = sorted(_NAMES)
    if name not in _NAMES:
        raise ValueError(f"swap tier {name!r} is unknown; choose one of {', '.join(known)}")
    made: Tier = import_module(f"{__name__}.{name}").open_tier(folder, limit_bytes)
    return made
