"""From a policy and its simulation to the ``Plan`` that is given out."""

from __future__ import annotations

from dataclasses import dataclass

from memopt.planner.devices import Rates
from memopt.planner.plan_file import Plan, model_signature
from memopt.planner.policy import Solution
from memopt.planner.units import format_bytes
from memopt.planner.validation import Simulation
from memopt.planner.values import BlockPlan, Category, Status, Trace


@dataclass(frozen=True)
class Answer:
    """A policy and what its simulation showed."""

    blocks: tuple[BlockPlan, ...]
    simulation: Simulation
    solution: Solution | None
    method: str


def weight_bytes(trace: Trace) -> int:
    """Bytes of the weights, which no plan moves: no budget below them can be met."""
    return sum(s.bytes for s in trace.storages if s.category is Category.WEIGHTS)


def assemble(
    trace: Trace,
    rates: Rates,
    budget_bytes: int | None,
    baseline: Simulation,
    answer: Answer,
    status: Status,
    gap: float,
    passes: int,
    seconds: float,
) -> Plan:
    found = answer.simulation
    return Plan(
        model=trace.model,
        model_signature=model_signature(trace),
        dtype=trace.dtype,
        hardware=rates.name,
        status=status,
        method=answer.method,
        gap=gap,
        budget_bytes=budget_bytes,
        peak_bytes=found.peak_bytes,
        peak_at=found.peak_at,
        baseline_peak_bytes=baseline.peak_bytes,
        by_category=found.by_category,
        smallest_budget_bytes=found.peak_bytes if status is Status.INFEASIBLE else None,
        binding=_binding(trace, found, budget_bytes),
        compute_seconds=found.compute_seconds,
        recompute_seconds=found.recompute_seconds,
        stall_seconds=found.stall_seconds,
        compression_seconds=found.compression_seconds,
        swap_tier=rates.tier,
        swapped_bytes=found.swapped_bytes,
        host_bytes=found.host_bytes,
        blocks=answer.blocks,
        timeline_before=baseline.timeline,
        timeline_after=found.timeline,
        solve_seconds=seconds,
        passes=passes,
        tiles=trace.tiles,
    )


def _binding(trace: Trace, found: Simulation, budget_bytes: int | None) -> str:
    """What the peak consists of, largest first, and whether the budget is what stops it."""
    parts = sorted(found.by_category.items(), key=lambda part: -part[1])
    text = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts if size)
    limit = "nothing" if budget_bytes is None or found.peak_bytes < 0.9 * budget_bytes else f"memory at {found.peak_at}"
    if budget_bytes is not None and budget_bytes < (weights := weight_bytes(trace)):
        limit = f"the weights alone, {format_bytes(weights)}, are above the budget; {limit}"
    return f"{limit} ({text})"
