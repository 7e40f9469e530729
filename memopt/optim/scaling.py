"""``torch.amp.GradScaler`` without waiting for the device: the fused step reads there what gradients were multiplied
by, and whether one of them overflowed.

Such a step changes nothing, but the host has counted it. Its flag is copied to the host meanwhile, and the step is
taken off the counts before they are needed again, at the next step or state dict: by then it has long arrived.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memopt.kernels import choose_backend
from memopt.optim import sharding
from memopt.optim.formats import get_format
from memopt.optim.owner import Owner


@dataclass
class _Step:
    """A step that may have been called off: its flag on the host, when that is there, and what has counted it."""

    flag: Tensor
    arrived: torch.Event | None
    counted: list[dict[str, Any]]


class Uncertain:
    """The steps of which the host does not know yet whether they were taken: the last one, or none."""

    def __init__(self) -> None:
        self._steps: list[_Step] = []

    def note(self, found_inf: Tensor, counted: Iterable[dict[str, Any]]) -> None:
        """A step has been handed to the device; ``counted`` are the states of its parameters."""
        if found_inf.device.type == "cpu":
            flag, arrived = found_inf.clone(), None
        else:
            flag = torch.empty_like(found_inf, device="cpu", pin_memory=True).copy_(found_inf, non_blocking=True)
            arrived = torch.Event(found_inf.device)
            arrived.record()
        self._steps.append(_Step(flag, arrived, list(counted)))

    def settle(self) -> None:
        """Take the steps that were called off from the counts."""
        for step in self._steps:
            if step.arrived is not None:
                step.arrived.synchronize()
            if float(step.flag) > 0:
                for stored in step.counted:
                    stored["step"] -= 1
        self._steps.clear()


def guard_of(optimizer: Owner) -> Tensor | None:
    """What the fused step reads on the device, float32: the factor of the gradients, and above 0 where one overflowed.

    None where there is no ``GradScaler``, or where the host has to know: for rules and formats whose step is more than
    one pass, outside Triton, and with ``skip_nonfinite``, which waits anyway.
    """
    found, scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
    if not isinstance(found, Tensor) or sharding.is_sharded(found) or choose_backend(found.device) != "triton":
        return None
    if not optimizer.elementwise or any(map(_needs_host, optimizer.param_groups)):
        return None
    factor = torch.ones_like(found) if scale is None else scale.to(found.device, torch.float32).reciprocal()
    return torch.stack([factor.reshape(()), found.reshape(())]).float()


def _needs_host(group: Mapping[str, Any]) -> bool:
    return bool(group["skip_nonfinite"]) or hasattr(get_format(group["state"]), "step")
