"""Finds the rules in ``memopt/optim/rules`` and makes their short names, so that a new rule is one new file.

A rule file defines one subclass of :class:`memopt.optim.optimizer.RuleOptimizer`. Its low-bit short names follow:
``AdamW`` gives ``AdamW8bit`` and ``AdamW4bit``.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from memopt.optim import formats, rules
from memopt.optim.optimizer import RuleOptimizer

_SHORT = ("8bit", "4bit")


def _short(base: type[RuleOptimizer], state: str) -> type[RuleOptimizer]:
    """The subclass of ``base`` whose ``state`` is fixed by its name; it takes the other arguments of ``base``."""

    @functools.wraps(base.__init__)
    def init(self: RuleOptimizer, params: Any, *args: Any, **options: Any) -> None:
        if "state" in options:
            raise TypeError(f"{type(self).__name__} sets state={state!r} itself; use {base.__name__} to choose another")
        base.__init__(self, params, *args, state=state, **options)

    name = f"{base.__name__}{state}"
    doc = f"``{base.__name__}`` with ``state={state!r}``; all other arguments are those of ``{base.__name__}``."
    return type(name, (base,), {"__init__": init, "__doc__": doc, "__module__": "memopt.optim"})


@functools.lru_cache(maxsize=1)
def optimizers() -> dict[str, type[RuleOptimizer]]:
    """Every optimizer class by its public name: ``AdamW``, ``AdamW8bit``, ``AdamW4bit``, ..."""
    found: dict[str, type[RuleOptimizer]] = {}
    for info in pkgutil.iter_modules(rules.__path__):
        module = importlib.import_module(f"{rules.__name__}.{info.name}")
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, RuleOptimizer) and value.__module__ == module.__name__:
                found[value.__name__] = value
                for state in _SHORT:
                    short = _short(value, state)
                    found[short.__name__] = short
    return found


@functools.lru_cache(maxsize=1)
def rules_by_name() -> dict[str, Callable[..., RuleOptimizer]]:
    """The class of each rule by the name that state dicts carry: ``adamw``, ``lion``, ..."""
    return {one.rule: one for one in optimizers().values() if one.__module__ != "memopt.optim"}


@functools.lru_cache(maxsize=1)
def _spellings() -> dict[str, tuple[str, str | None]]:
    """``"adamw8bit"`` and the like -> (class name, format or None for the class's default)."""
    found: dict[str, tuple[str, str | None]] = {}
    for name in optimizers():
        found[name.lower()] = (name, None)
    for name, one in optimizers().items():
        if one.__module__ != "memopt.optim":
            found[name.lower()] = (name, "fp32")
            for state in formats.names():
                found.setdefault(f"{name.lower()}{state}", (name, state))
    return found


def by_name(name: str) -> tuple[type[RuleOptimizer], dict[str, Any]]:
    """The class that a name such as ``"adamw8bit"`` stands for, and the options that it implies; see :func:`make`.

    Raises:
        ValueError: no such optimizer; the message lists the choices and close matches.
    """
    spelled = str(name).lower().replace("_", "").replace(" ", "")
    known = _spellings()
    if spelled not in known:
        close = difflib.get_close_matches(spelled, known, n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        listed = ", ".join(sorted(n.lower() for n, one in optimizers().items() if one.__module__ != "memopt.optim"))
        raise ValueError(
            f"unknown optimizer {name!r}{hint} The rules are {listed}; "
            f"each may be followed by a state format: {', '.join(formats.names())}"
        )
    class_name, state = known[spelled]
    return optimizers()[class_name], {} if state is None else {"state": state}


def make(name: str, params: Iterable[Tensor] | Iterable[dict[str, Any]], **options: Any) -> RuleOptimizer:
    """An optimizer by name, as ``memopt.wrap`` and the command line take it.

    ``"adamw8bit"``, ``"lion4bit"``, ``"sgdbf16"``, ``"adamw8bit-dynamic"``: rule and format in one word, in any case,
    with or without ``_`` or a blank between them. A rule alone (``"adamw"``) keeps fp32 states, unless ``state=`` is
    among the options.

    Args:
        name: rule and format.
        params: what the optimizer's constructor takes: parameters, or groups of them.
        **options: the rule's own options (``lr``, ``betas``, ...).

    Raises:
        ValueError: no such optimizer; the message lists the choices and close matches.
    """
    kind, implied = by_name(name)
    return kind(params, **{**implied, **options})
