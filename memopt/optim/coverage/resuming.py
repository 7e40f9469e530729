"""Reads the state dicts of coverages: everything is checked before anything changes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

from memopt.optim import checks


def parse(text: Any, name: str, keys: Iterable[str], check: Callable[[Mapping[str, Any]], None]) -> dict[str, Any]:
    """A position in the cycle, as a coverage's ``position`` gives it.

    Args:
        text: the position.
        name: the coverage's class.
        keys: what its positions hold besides.
        check: raises ``ValueError`` or ``TypeError`` where their values do not fit.

    Raises:
        ValueError: it is not one of a coverage like this.
    """
    try:
        position = json.loads(text)
    except (TypeError, ValueError):
        position = None
    if not isinstance(position, dict):
        raise ValueError(f"expected a position of {name} and found {text!r}; was this saved by {name}?")
    if position.get("of") != name:
        raise ValueError(f"this is a position of {position.get('of')!r}, this optimizer is {name}: {text}")
    missing = [key for key in ("started", *keys) if key not in position]
    if missing:
        raise ValueError(f"the position lacks {', '.join(missing)}, nothing loaded: {text}")
    try:
        checks.flag(position, "started")
        checks.whole(position, "visit", "since", maximum=2**63 - 1)
        check(position)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the position does not fit this {name}, nothing loaded: {error}") from error
    return position


def read(incoming: Mapping[str, Any], sizes: Sequence[int]) -> tuple[list[dict[str, Any]], dict[int, dict[str, Any]]]:
    """The groups of a state dict, and its states by position: it may name parameters instead of counting them.

    Args:
        incoming: the state dict.
        sizes: how many parameters each of the optimizer's groups has.

    Raises:
        ValueError: it has not the form of one, or groups of other sizes.
    """
    if "state" not in incoming or "param_groups" not in incoming:
        raise ValueError(f"the state dict needs 'state' and 'param_groups'; it has {sorted(incoming)}")
    groups, states = cast("list[dict[str, Any]]", incoming["param_groups"]), incoming["state"]
    if not isinstance(groups, list | tuple) or not all(isinstance(g, Mapping) and "params" in g for g in groups):
        raise ValueError("param_groups of the state dict is no list of groups with 'params'; nothing loaded")
    if not isinstance(states, Mapping):
        raise ValueError("state of the state dict is no mapping of parameters to their states; nothing loaded")
    saved = [len(group["params"]) for group in groups]
    if list(sizes) != saved:
        raise ValueError(f"the state dict has groups of {saved} parameters, this optimizer of {sizes}; nothing loaded")
    keys = [key for group in groups for key in group["params"]]
    return groups, {i: states[key] for i, key in enumerate(keys) if key in states}
