"""Every rule there is, in every format: what holds for all of them is tested over these."""

from __future__ import annotations

from typing import Any

import memopt.optim as room
from memopt.optim.formats import names
from memopt.optim.registry import rules_by_name

RULES = sorted((one.__name__ for one in rules_by_name().values()), key=str.lower)
PAIRS = [(rule, state) for rule in RULES for state in names()]


def usual(rule: str) -> dict[str, Any]:
    """What a rule needs beside its defaults to hold any state."""
    return {"momentum": 0.9} if rule == "SGD" else {}


def made(rule: str, params: Any, **options: Any) -> Any:
    """An optimizer by the name of its class, or by a short one such as ``Lion8bit``."""
    return getattr(room, rule)(params, **{"lr": 0.01, **usual(rule), **options})
