"""Names that a package does not have: renamed ones work for one release more and warn, others say what there is."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple


class Renamed(NamedTuple):
    """Where a name has gone (``module:name``), and the version in which the old one stops working."""

    now: str
    until: str


RENAMED: dict[str, Renamed] = {}  # "module.old_name" -> Renamed; the entry leaves with the old name


def missing(module: str, name: str, offered: Sequence[str]) -> Any:
    """The end of a package's ``__getattr__``: the value of a renamed name, with a ``FutureWarning``.

    Raises:
        AttributeError: there was never such a name; the message lists ``offered``.
    """
    moved = RENAMED.get(f"{module}.{name}")
    if moved is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}; it offers {', '.join(offered)}")
    home, _, attribute = moved.now.partition(":")
    warnings.warn(
        f"{module}.{name} is now {home}.{attribute}; the old name goes in memopt {moved.until}",
        FutureWarning,
        stacklevel=3,
    )
    return getattr(importlib.import_module(home), attribute)
