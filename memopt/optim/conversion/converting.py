"""``convert``: one library's optimizer state dict as another's."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from memopt.optim import conversion
from memopt.optim.conversion.codes import put_codes
from memopt.optim.conversion.plain import Library, StateDict
from memopt.optim.optimizer import RuleOptimizer
from memopt.optim.registry import rules_by_name


@lru_cache(maxsize=1)
def libraries() -> dict[str, Library]:
    """Every library by its name: each file of this folder that defines ``LIBRARY``."""
    found = {}
    for module in pkgutil.iter_modules(conversion.__path__):
        one = getattr(importlib.import_module(f"{conversion.__name__}.{module.name}"), "LIBRARY", None)
        if one is not None:
            found[one.name] = one
    return found


def convert(
    state_dict: Mapping[str, Any],
    source: str,
    target: str | RuleOptimizer = "torch",
    *,
    rule: str | None = None,
    bits: int = 8,
) -> StateDict:
    """An optimizer's state dict as another library's, or as one of our optimizers takes it.

    8-bit codes pass as they are between bitsandbytes, torchao and our ``"8bit-dynamic"``, whose levels and scales are
    the same, for parameters whose rows are whole blocks of 256 elements, or shorter than one, or that have one
    dimension. All other states are decoded to fp32 in between and rounded to nearest where the target has fewer bits.

    Args:
        state_dict: what the source optimizer's ``state_dict()`` returned. It is not changed.
        source: ``"torch"``, ``"bitsandbytes"``, ``"torchao"`` or ``"memopt"``.
        target: one of the same names, or an optimizer of memopt, whose ``load_state_dict`` takes the result.
        rule: memopt's name of the rule (``"adamw"``, ``"lion"``, ...); by default the target optimizer's, else what a
            memopt state dict says, else ``"adamw"``.
        bits: bits a state in the target where it has a choice (bitsandbytes 8 or 32, torchao 4, 8 or 32, memopt 4, 8,
            16 or 32); torch always has its parameters' own type.

    Returns:
        A new state dict with the same parameter numbers.

    Raises:
        ValueError: an unknown library or rule, or a state dict that is not the source's; the message says which.
        ImportError: the target's format is made by its own library, which is not installed.
    """
    known = libraries()
    for argument, name in (("source", source), ("target", target)):
        if isinstance(name, str) and name not in known:
            raise ValueError(f"{argument} is {name!r}; the choices are {', '.join(sorted(known))}")
    if rule is None:
        said = {group.get("rule") for group in state_dict.get("param_groups", ())} - {None}
        rule = target.rule if isinstance(target, RuleOptimizer) else next(iter(said), "adamw")
    if rule not in rules_by_name():
        raise ValueError(f"rule is {rule!r}; the choices are {', '.join(sorted(rules_by_name()))}")
    plain = known[source].read(state_dict, rule)
    codes = known[source].codes
    shared = codes(state_dict, rule) if codes is not None else {}
    if isinstance(target, RuleOptimizer):
        return put_codes(plain, shared, target)
    written, put = known[target].write(plain, rule, bits), known[target].put
    if put is not None:
        put(written, shared, rule)
    return written
