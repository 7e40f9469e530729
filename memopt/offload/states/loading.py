"""Loads the state dict of an optimizer that is made of several, whole or not at all."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer


def load_all(
    optimizers: Sequence[Optimizer],
    state: Any,
    key: str,
    unit: str,
    load: Callable[[Optimizer, Any], None],
) -> None:
    """Load each optimizer's part of a state dict; where one does not fit, all are as they were before.

    The old states stay where they are until every part is loaded: for that time there is room for both.

    Args:
        optimizers: those that are loaded, in the order of the parts.
        state: the state dict.
        key: where it has its list of parts.
        unit: what a part is for, as messages name it.
        load: loads one part into its optimizer, replacing the optimizer's mapping of states and its groups.

    Raises:
        ValueError: no such list, or one of another length.
    """
    parts = state.get(key) if isinstance(state, Mapping) else None
    if not isinstance(parts, list | tuple):
        raise ValueError(f"state has no list of {key!r}; give what the same kind of optimizer's state_dict() returned")
    if len(parts) != len(optimizers):
        raise ValueError(
            f"state is for {len(parts)} {unit}, this optimizer has {len(optimizers)}: build it in the same way from "
            "the same parameters"
        )
    before = [{**optimizer.__dict__, "state": copy.copy(optimizer.state)} for optimizer in optimizers]
    try:
        for optimizer, part in zip(optimizers, parts, strict=True):
            load(optimizer, part)
    except BaseException:
        for optimizer, old in zip(optimizers, before, strict=True):
            optimizer.__dict__.clear()
            optimizer.__dict__.update(old)
        raise
