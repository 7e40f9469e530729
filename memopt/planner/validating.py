"""Checks a plan by simulating what the runtime does, operation by operation and storage by storage.

Slow and obvious on purpose: it shares no code with the problem, the program or the solver.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from memopt.planner.plan_file import Plan, Timeline, model_signature
from memopt.planner.rates import HardwareLike, rates_of
from memopt.planner.simulating import Simulation, simulate
from memopt.planner.values import Action, BlockPlan, Trace


@dataclass(frozen=True)
class Validation:
    """``broken`` names the rule that the plan breaks, in words; ``None`` where it keeps all of them."""

    broken: str | None
    peak_bytes: int
    peak_at: str
    by_category: dict[str, int]
    timeline: Timeline
    simulation: Simulation | None


def validate(trace: Trace, plan: Plan, hardware: HardwareLike | None = None) -> Validation:
    """Simulate a plan on its trace and check every promise it makes.

    Rules: made for this trace; no block call planned twice (one without a plan is kept); every saved storage has one
    fate, or shares of its rows that add up to 1; sizes as traced; nothing recomputed that no operation of the block
    writes; swapped bytes within the tier's room; the peak within the budget, and as promised.

    Args:
        trace: the step the plan was made for.
        plan: what to check.
        hardware: the device, as for ``plan``; default: the one in the table that the plan names.
    """
    rates = rates_of(plan.hardware if hardware is None else hardware, trace.dtype)
    broken = _broken_shape(trace, plan.blocks)
    if broken is None and plan.model_signature != model_signature(trace):
        broken = "the plan was made for another model or step"
    if broken is not None:
        return Validation(broken, 0, "", {}, Timeline((), {}), None)
    found = simulate(trace, plan.blocks, rates)
    broken = found.broken
    if broken is None and found.host_bytes > rates.host_bytes:
        broken = f"{found.host_bytes} bytes swapped at a time exceed the {rates.host_bytes} of the {rates.tier}"
    if broken is None and plan.budget_bytes is not None and found.peak_bytes > plan.budget_bytes:
        broken = f"peak of {found.peak_bytes} bytes at {found.peak_at} exceeds the budget of {plan.budget_bytes}"
    if broken is None and found.peak_bytes != plan.peak_bytes:
        broken = f"peak is {found.peak_bytes} bytes, the plan promises {plan.peak_bytes}"
    return Validation(broken, found.peak_bytes, found.peak_at, found.by_category, found.timeline, found)


def _broken_shape(trace: Trace, plans: tuple[BlockPlan, ...]) -> str | None:
    """The first rule that the actions break before anything runs."""
    blocks = {(block.path, block.call): block for block in trace.blocks}
    seen = set()
    for plan in plans:
        name = f"block {plan.path} (call {plan.call})"
        block = blocks.get((plan.path, plan.call))
        if block is None:
            return f"{name} is not in the trace"
        if (plan.path, plan.call) in seen:
            return f"{name} is planned twice"
        seen.add((plan.path, plan.call))
        if plan.signature != block.signature:
            return f"{name} has signature {block.signature}, the plan was made for {plan.signature}"
        shares: defaultdict[int, float] = defaultdict(float)
        sizes = {saved.index: saved.bytes for saved in block.saved}
        for action in plan.actions:
            if action.index not in sizes:
                return f"{name} has no saved storage {action.index}"
            if action.bytes != sizes[action.index]:
                return f"{name}: saved storage {action.index} has {sizes[action.index]} bytes, not {action.bytes}"
            if not 0 <= action.fraction <= 1:
                return f"{name}: saved storage {action.index} has the fraction {action.fraction}"
            if (action.format is None) == (action.action is Action.COMPRESS):
                return f"{name}: saved storage {action.index}: a format is for compressed storages, and for them a must"
            shares[action.index] += action.fraction
        for index in sizes:
            if abs(shares[index] - 1) > 1e-9:
                return f"{name}: the fates of saved storage {index} cover {shares[index]:.6g} of it, not all of it once"
    return None
