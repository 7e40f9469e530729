"""What the planner needs to know about a device, out of the hardware table."""

from __future__ import annotations

from typing import Any

from memopt.planner.problem import Rates

HardwareLike = Any


def rates_of(hardware: HardwareLike, dtype: str) -> Rates:
    """The device's rates for a model of ``dtype``."""
    if isinstance(hardware, Rates):
        return hardware
    raise ValueError(f"hardware {hardware!r}")
