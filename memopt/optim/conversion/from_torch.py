"""torch.optim: the plain form itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from memopt.optim.conversion.plain import Library, StateDict, mapped, step_tensor


def _entry(stored: Mapping[str, Any]) -> dict[str, Any]:
    states = {name: value.float() for name, value in stored.items() if isinstance(value, Tensor) and name != "step"}
    return {"step": step_tensor(stored.get("step", 1)), **states} if stored else {}


def read(state_dict: Mapping[str, Any], rule: str) -> StateDict:
    """torch's states in fp32. SGD keeps no step count; 1 stands for it."""
    return mapped(state_dict, _entry)


def write(plain: StateDict, rule: str, bits: int) -> StateDict:
    """As it is: torch casts states to the parameters' type when it loads them."""
    return plain


LIBRARY = Library("torch", read, write)
