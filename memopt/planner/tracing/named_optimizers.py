"""Optimizers by name, for traces: how many bytes they keep for each parameter, without their arithmetic.

A name is a rule and a format in one word, such as "adamw", "adamw8bit" or "lion4bit". memopt's own optimizers, given as
objects, are traced with the state that they really make; the names serve where only the planner is at hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from memopt.planner.naming import unknown

_MOMENTS = {
    "adamw": 2,
    "adam": 2,
    "lamb": 2,
    "ademamix": 3,
    "lion": 1,
    "sgd": 1,
    "rmsprop": 1,
    "adagrad": 1,
    "lars": 1,
    "muon": 1,
    "normuon": 1,
    "adammini": 1,
}
"""Numbers kept for each element of a parameter, by rule."""

_BITS = {"": 32.0, "fp32": 32.0, "bf16": 16.0, "8bit": 8.125, "8bitdynamic": 8.125, "4bit": 4.25, "4bitpaper": 4.25}
"""Bits of each such number with its share of a scale, by format."""

_SMALL = 4096
"""Parameters with fewer elements keep 32-bit numbers in every format."""


class NamedOptimizer(Optimizer):
    """Keeps as many bytes for each parameter as the optimizer of that name, and changes nothing."""

    def __init__(self, parameters: Iterable[Tensor], name: str) -> None:
        self.moments, self.bits = _rule_and_format(name)
        super().__init__(parameters, {"name": name})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes the state of parameters that have a gradient and none yet."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not self.state[parameter]:
                    bits = self.bits if parameter.numel() >= _SMALL else 32.0
                    size = math.ceil(parameter.numel() * self.moments * bits / 8)
                    self.state[parameter]["moments"] = torch.zeros(size, dtype=torch.uint8, device=parameter.device)
        return None


def check_name(name: str) -> None:
    """Refuse a name that stands for no optimizer.

    Raises:
        ValueError: the message gives the names.
    """
    _rule_and_format(name)


def _rule_and_format(name: str) -> tuple[int, float]:
    spelled = name.lower().replace("-", "").replace("_", "").replace(" ", "")
    for rule in sorted(_MOMENTS, key=len, reverse=True):
        if spelled.startswith(rule) and spelled[len(rule) :] in _BITS:
            return _MOMENTS[rule], _BITS[spelled[len(rule) :]]
    followed = f", each alone (32-bit state) or followed by {', '.join(format for format in _BITS if format)}"
    raise ValueError(unknown("optimizer", name, sorted(_MOMENTS), followed))
