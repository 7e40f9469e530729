"""What others do with activations, as plans of ours: one file per method, found by its name.

Each file has ``choose(trace, rates, budget_bytes)``, which returns the actions of every block call.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from memopt.planner.devices import HardwareLike, rates_of
from memopt.planner.units import parse_bytes
from memopt.planner.validation import Simulation, simulate
from memopt.planner.values import BlockPlan, Trace

__all__ = ["BASELINES", "baseline"]

BASELINES = tuple(sorted(m.name for m in iter_modules(__path__) if m.name != "whole_blocks"))


def baseline(
    name: str, trace: Trace, budget: int | str, hardware: HardwareLike = "auto"
) -> tuple[tuple[BlockPlan, ...], Simulation]:
    """What another method would do with a trace under a budget, and what that would cost, by our simulation.

    Args:
        name: one of ``BASELINES``.
        trace: the step.
        budget: bytes; methods that know no budget ignore it, so that the peak may exceed it.
        hardware: as for ``plan``.

    Raises:
        ValueError: an unknown name, budget or hardware.
    """
    if name not in BASELINES:
        raise ValueError(f"baseline {name!r} is unknown; choose {', '.join(BASELINES)}")
    rates = rates_of(hardware, trace.dtype)
    plans: tuple[BlockPlan, ...] = import_module(f"{__name__}.{name}").choose(trace, rates, parse_bytes(budget))
    return plans, simulate(trace, plans, rates)
