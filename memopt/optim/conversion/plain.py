"""The form between libraries: a state dict as torch's optimizers have it, every state an fp32 tensor of the
parameter's shape under torch's name, ``step`` a tensor of one float."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

StateDict = dict[str, Any]


@dataclass(frozen=True)
class Library:
    """How one library's state dicts are read and written.

    Args:
        name: what ``source=`` and ``target=`` call it.
        read: (its state dict, memopt's rule name) to the plain form.
        write: (the plain form, memopt's rule name, bits per state) to its state dict.
        codes: (its state dict, memopt's rule name) to the 8-bit codes in it (:mod:`memopt.optim.conversion.codes`).
        put: puts such codes into the state dict that ``write`` made, where they are those of its own map.
    """

    name: str
    read: Callable[[Mapping[str, Any], str], StateDict]
    write: Callable[[StateDict, str, int], StateDict]
    codes: Callable[[Mapping[str, Any], str], Any] | None = None
    put: Callable[[StateDict, Any, str], None] | None = None


def step_tensor(step: Any) -> torch.Tensor:
    """A step count as torch keeps it."""
    return torch.tensor(float(step))


def mapped(state_dict: Mapping[str, Any], entry: Callable[[Mapping[str, Any]], dict[str, Any]]) -> StateDict:
    """The state dict with each parameter's states replaced; groups are copied.

    Raises:
        ValueError: it is no optimizer's state dict.
    """
    for part in ("state", "param_groups"):
        if part not in state_dict:
            raise ValueError(f"the state dict has no {part!r}; it must be what an optimizer's state_dict() returned")
    state = {}
    for key, stored in state_dict["state"].items():
        try:
            state[key] = entry(stored)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"parameter {key} of the state dict cannot be read: {error}") from error
    return {"state": state, "param_groups": [dict(group) for group in state_dict["param_groups"]]}
