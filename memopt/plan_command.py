"""What ``memopt plan`` does: trace a step, decide, and show it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import RenderableType

if TYPE_CHECKING:
    from memopt.planner import BlockPlan, Combination, Degrees, Hardware, Plan, Trace

Say = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """What the command line asks for: a model's step, a device, and how much of it may be used.

    ``search`` is "seq" or "batch" where the largest is wanted, ``changes`` are made before anything is decided.
    ``tiles`` is None where the step runs in tiles only if nothing fits otherwise.
    """

    model: str
    device: Hardware
    budget: int
    batch: int
    seq: int | None
    dtype: str
    optimizer: str
    degrees: Degrees
    changes: tuple[str, ...]
    fit: bool
    search: str | None
    tiles: int | None = None


@dataclass(frozen=True)
class Answer:
    """The plan, the step that it is for, and pages to be shown before its own; ``cure`` is what would make it fit."""

    plan: Plan
    trace: Trace
    pages: tuple[RenderableType, ...] = ()
    cure: Combination | None = None


def answer(asked: Asked, say: Say) -> Answer:
    """Trace and decide; ``say`` is told what is being done.

    Raises:
        ValueError: bad input, or a solver that could not answer; the message is one for the command line.
    """
    from memopt.planner import SolverError
    from memopt.planner.models import is_function

    sizes = asked.search or ("seq" if asked.seq is not None else "batch" if asked.batch != 1 else None)
    if sizes is not None and is_function(asked.model):
        given = f"--max-{sizes}" if asked.search else f"--{sizes}"
        raise ValueError(f"{asked.model} makes its own batch, so that {given} has nothing to change there")
    try:
        if asked.search is not None:
            return _largest(asked, say)
        say("tracing one training step")
        step = _traced(asked, asked.batch, asked.seq, asked.tiles or 1)
        found = _fitted(asked, step, say) if asked.fit else _planned(asked, step, say)
        return replace(found, pages=(*found.pages, *_notes(found.trace)))
    except SolverError as error:
        raise ValueError(str(error)) from error


def _notes(step: Trace) -> tuple[str, ...]:
    lines = step.meta.get("guessed_at")
    return (f"Note: the step depends on values at {lines}; the trace took 1.0, 0 or False there.\n",) if lines else ()


def _traced(asked: Asked, batch: int, seq: int | None, tiles: int) -> Trace:
    from memopt.planner import find_model, shard, trace
    from memopt.planner.variants import change

    found = find_model(asked.model, batch=batch, tokens=seq, dtype=asked.dtype)
    on = "cpu" if asked.device.kind == "cpu" else "cuda"
    step = trace(found.model, found.inputs, loss_fn=found.loss_fn, optimizer=asked.optimizer, device=on, tiles=tiles)
    step = shard(replace(step, model=found.name), asked.degrees)
    for name in asked.changes:
        step = change(name).apply(step)
    return step


def _planned(asked: Asked, step: Trace, say: Say) -> Answer:
    from memopt.planner import plan_in_tiles
    from memopt.planner.planning import AUTOMATIC, cheapest, estimates

    def in_tiles(number: int) -> Trace:
        if number == (asked.tiles or 1):
            return step
        say(f"nothing fits; trying {number} tiles")
        return _traced(asked, asked.batch, asked.seq, number)

    say("deciding what to keep, swap and recompute")
    tried = AUTOMATIC if asked.tiles is None else (asked.tiles,)
    planned, found = plan_in_tiles(in_tiles, asked.budget, asked.device, tiles=tried)
    if found.status != "infeasible":
        return Answer(found, planned)
    say("nothing fits; looking for what to change")
    cure = cheapest(estimates(step, asked.budget, asked.device))
    if cure is None:
        cure = cheapest(estimates(step, asked.budget, asked.device, allow_block_coordinate=True))
    return Answer(found, planned, cure=cure)


def _fitted(asked: Asked, step: Trace, say: Say) -> Answer:
    from memopt.planner import fit, plan
    from memopt.planner.variants import change
    from memopt.report import terminal

    say("estimating every combination of changes")
    found = fit(step, asked.budget, asked.device)
    if found.best is None or found.best.plan is None:
        return Answer(plan(step, asked.budget, asked.device), step, (terminal.fit_page(found),))
    for name in found.best.changes:
        step = change(name, float(step.meta.get("state_bits", 32))).apply(step)
    return Answer(found.best.plan, step, (terminal.fit_page(found),))


def _largest(asked: Asked, say: Say) -> Answer:
    from memopt.planner import largest_that_fits, plan

    say(f"searching for the largest {asked.search} that fits")
    made: dict[int, Trace] = {}

    def step(size: int) -> Trace:
        say(f"trying {asked.search} {size}")
        batch, seq = (asked.batch, size) if asked.search == "seq" else (size, asked.seq)
        made[size] = _traced(asked, batch, seq, asked.tiles or 1)
        return made[size]

    least = 128 if asked.search == "seq" else 1
    size, best = largest_that_fits(step, asked.budget, asked.device, step=least)
    if best is None:
        return Answer(plan(made[least], asked.budget, asked.device), made[least], ("Not even the smallest fits.\n",))
    what = "sequence" if asked.search == "seq" else "batch"
    return Answer(best, made[size], (f"Largest {what} that fits: {size}\n",))


def write_reports(
    found: Answer, device: Hardware, html: Path | None, perfetto: Path | None, snapshot: Path | None, say: Say
) -> None:
    """Write the files that were asked for: both timelines, and where every allocation of the step lies."""
    from memopt.planner.devices import rates_of
    from memopt.planner.validation import simulate
    from memopt.report import Box, boxes_of, write_html, write_perfetto, write_snapshot

    plan, step = found.plan, found.trace
    runs = {"before": plan.timeline_before, "after": plan.timeline_after}
    if perfetto is not None:
        write_perfetto(perfetto, runs=runs)
    if html is None and snapshot is None:
        return
    say("placing every allocation of the step")
    rates = rates_of(device, step.dtype)

    def boxes(blocks: tuple[BlockPlan, ...]) -> list[Box]:
        return boxes_of(simulate(step, blocks, rates).allocations)

    after = boxes(plan.blocks)
    if html is not None:
        maps = {"before": boxes(())} | ({"after": after} if plan.blocks else {})
        title = f"{plan.model} on {plan.hardware}"
        write_html(html, title=title, runs=runs, maps=maps, facts=_facts(plan), limit_bytes=plan.budget_bytes)
    if snapshot is not None:
        write_snapshot(snapshot, after)


def _facts(plan: Plan) -> dict[str, str]:
    """What the page says first."""
    from memopt.planner import format_bytes
    from memopt.report.terminal import format_seconds

    extra = {"recompute": plan.recompute_seconds, "stall": plan.stall_seconds, "compress": plan.compression_seconds}
    parts = ", ".join(f"{name} {format_seconds(value)}" for name, value in extra.items() if value)
    facts = {
        "verdict": "does not fit" if plan.status == "infeasible" else "fits",
        "peak": format_bytes(plan.peak_bytes),
        "without a plan": format_bytes(plan.baseline_peak_bytes),
        "step, modelled": format_seconds(plan.step_seconds) + (f" ({parts})" if parts else ""),
        "swapped per step": f"{format_bytes(plan.swapped_bytes)} to {plan.swap_tier}" if plan.swapped_bytes else "",
        "smallest budget that fits": format_bytes(plan.smallest_budget_bytes) if plan.smallest_budget_bytes else "",
        "at the peak runs": plan.peak_at,
    }
    return {name: value for name, value in facts.items() if value}
