"""torch.optim: the plain form itself."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from memopt.optim.conversion.plain import Library, StateDict, mapped, step_tensor
from memopt.optim.registry import rules_by_name


def _entry(stored: Mapping[str, Any]) -> dict[str, Any]:
    states = {name: value.float() for name, value in stored.items() if isinstance(value, Tensor) and name != "step"}
    return {"step": step_tensor(stored.get("step", 1)), **states} if stored else {}


def read(state_dict: Mapping[str, Any], rule: str) -> StateDict:
    """torch's states in fp32. SGD keeps no step count; 1 stands for it."""
    return mapped(state_dict, _entry)


def write(plain: StateDict, rule: str, bits: int) -> StateDict:
    """With torch's defaults for options that its class alone has; it casts states to the parameters' type itself."""
    theirs = getattr(torch.optim, rules_by_name()[rule].__name__, None)
    if theirs is not None:
        arguments = inspect.signature(theirs.__init__).parameters
        defaults = {k: v.default for k, v in arguments.items() if v.default is not inspect.Parameter.empty}
        plain["param_groups"] = [{**defaults, **group} for group in plain["param_groups"]]
    return plain


LIBRARY = Library("torch", read, write)
