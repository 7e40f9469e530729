"""Finds the formats of this folder, and keeps those that users add."""

from __future__ import annotations

import importlib
import pkgutil
from functools import lru_cache
from typing import cast

from memopt.optim import formats
from memopt.optim.formats.base import StateFormat
from memopt.optim.layout import MIN_LOW_BIT_SIZE, Extent

_MEMBERS = ("name", "block", "codec", "keys", "allocate", "operand", "encode", "decode")
_added: dict[str, StateFormat] = {}


@lru_cache(maxsize=1)
def _built_in() -> dict[str, StateFormat]:
    found: dict[str, StateFormat] = {}
    for module in pkgutil.iter_modules(formats.__path__):
        one = getattr(importlib.import_module(f"{formats.__name__}.{module.name}"), "FORMAT", None)
        if one is not None:
            found[one.name] = one
    return found


def names() -> tuple[str, ...]:
    """What ``state=`` accepts, sorted."""
    return tuple(sorted({**_built_in(), **_added}))


def register(new: StateFormat) -> None:
    """Make a format available by its name, so that state dicts can name it.

    Raises:
        TypeError: it lacks a member of ``StateFormat``.
        ValueError: another format has that name.
    """
    missing = [member for member in _MEMBERS if not hasattr(new, member)]
    if missing:
        raise TypeError(f"state format {new!r} lacks {', '.join(missing)}; see memopt.optim.StateFormat")
    known = {**_built_in(), **_added}.get(new.name)
    if known is not None and known != new:
        raise ValueError(f"a different state format is already called {new.name!r}; choose another name")
    if known is None:
        _added[new.name] = new


def get_format(state: str | StateFormat) -> StateFormat:
    """The format called ``state``; a format object registers itself.

    Raises:
        ValueError: no format of that name; the message lists those there are.
        TypeError: neither a name nor a format.
    """
    if not isinstance(state, str):
        register(state)
        return state
    known = {**_built_in(), **_added}
    if state not in known:
        raise ValueError(f"unknown state format {state!r}; the choices are {', '.join(names())}")
    return known[state]


def format_for(state: str | StateFormat, extent: Extent) -> StateFormat:
    """How a parameter of this shape is kept under ``state``: in fp32 where it is small and the format has few bits."""
    chosen = get_format(state)
    if chosen.block and extent.numel < MIN_LOW_BIT_SIZE:
        return get_format("fp32")
    suited = getattr(chosen, "for_extent", None)
    return chosen if suited is None else cast(StateFormat, suited(extent))
