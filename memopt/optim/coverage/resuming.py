"""Reads the state dicts of coverages: everything is checked before anything changes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from memopt.optim import checks

if TYPE_CHECKING:
    from memopt.optim.coverage.nested import Nested


def parse(coverage: Nested, text: Any) -> dict[str, Any]:
    """A position in the cycle, as ``coverage.position`` gives it.

    Raises:
        ValueError: it is not one of a coverage like this.
    """
    name = type(coverage).__name__
    try:
        position = json.loads(text)
    except (TypeError, ValueError):
        position = None
    if not isinstance(position, dict):
        raise ValueError(f"expected a position of {name} and found {text!r}; was this saved by {name}?")
    if position.get("of") != name:
        raise ValueError(f"this is a position of {position.get('of')!r}, this optimizer is {name}: {text}")
    missing = [key for key in ("started", *coverage._get_position()) if key not in position]
    if missing:
        raise ValueError(f"the position lacks {', '.join(missing)}, nothing loaded: {text}")
    try:
        checks.flag(position, "started")
        checks.whole(position, "visit", "since", maximum=2**63 - 1)
        coverage._check_position(position)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the position does not fit this {name}, nothing loaded: {error}") from error
    return position


def read(coverage: Nested, incoming: Mapping[str, Any]) -> tuple[list[dict[str, Any]], dict[int, dict[str, Any]]]:
    """The groups of a state dict, and its states by position: it may name parameters instead of counting them.

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
    sizes = [len(group["params"]) for group in coverage.param_groups]
    saved = [len(group["params"]) for group in groups]
    if sizes != saved:
        raise ValueError(f"the state dict has groups of {saved} parameters, this optimizer of {sizes}; nothing loaded")
    keys = [key for group in groups for key in group["params"]]
    return groups, {i: states[key] for i, key in enumerate(keys) if key in states}
