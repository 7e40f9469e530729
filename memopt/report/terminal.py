"""What a plan says, on one terminal page: does it fit, where the bytes are, what it costs, what binds."""

from __future__ import annotations

from collections import Counter
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from memopt.planner import format_bytes, schedule_table
from memopt.planner.values import Action, BlockPlan

if TYPE_CHECKING:
    from memopt.planner import Combination, Fit, Placement, Plan

BAR_CELLS = 40


def plan_page(plan: Plan, cure: Combination | None = None) -> Group:
    """The page that ``memopt plan`` prints.

    Args:
        plan: any plan, also one that found that nothing fits.
        cure: what to change where nothing fits.

    Returns:
        A rich group: verdict, peak by category, seconds, blocks, and what to change.
    """
    return Group(_verdict(plan), "", _peak(plan), "", _seconds(plan), *_blocks(plan), "", _advice(plan, cure))


def format_seconds(seconds: float) -> str:
    """Print a duration with the unit that keeps it readable: ``"1.25 s"``, ``"31.0 ms"``, ``"8.0 us"``."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if abs(seconds) >= scale or unit == "us":
            return f"{seconds / scale:.3g} {unit}"
    raise AssertionError("unreachable: the last unit takes every value")


def _verdict(plan: Plan) -> Text:
    fits = plan.status != "infeasible"
    budget = "no limit" if plan.budget_bytes is None else format_bytes(plan.budget_bytes)
    line = Text()
    line.append("FITS" if fits else "DOES NOT FIT", style="bold green" if fits else "bold red")
    peak = format_bytes(plan.peak_bytes)
    if not fits and peak == budget:
        peak = f"a little over {peak}"
    line.append(f"  {plan.model} on {plan.hardware}: peak {peak} of {budget}")
    if plan.baseline_peak_bytes != plan.peak_bytes:
        line.append(f", {format_bytes(plan.baseline_peak_bytes)} without a plan")
    if not fits and plan.smallest_budget_bytes is not None:
        line.append(f"\nThe smallest budget that fits is {enough(plan.smallest_budget_bytes)}.", style="bold")
    return line


def enough(size: int) -> str:
    """A size that one can type as a budget: rounded up, by at most a thousandth."""
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        count = -(-size // unit)
        if count * unit <= 1.001 * size:
            return f"{count}{name}"
    return f"{size}B"


def _heading(text: str) -> Text:
    """Above a table, not its title, which would be broken at the table's width."""
    return Text(text, style="bold")


def _words(name: str) -> str:
    """``logits_and_loss`` and ``aten._softmax.default`` as one reads them."""
    return name.removeprefix("aten.").split(".")[0].strip("_").replace("_", " ")


def _peak(plan: Plan) -> Group:
    table = Table()
    table.add_column("category")
    table.add_column("size", justify="right")
    table.add_column("share of the budget" if plan.budget_bytes else "share of the peak")
    whole = plan.budget_bytes or plan.peak_bytes
    for category, size in sorted(plan.by_category.items(), key=lambda item: -item[1]):
        if not size:
            continue
        cells = round(BAR_CELLS * size / whole)
        table.add_row(_words(category), format_bytes(size), f"{'█' * min(cells, BAR_CELLS)} {size / whole:.1%}")
    if whole > plan.peak_bytes:
        free = whole - plan.peak_bytes
        table.add_row("free", format_bytes(free), f"{'░' * round(BAR_CELLS * free / whole)} {free / whole:.1%}")
    return Group(_heading(f"Bytes at the peak, in {_words(plan.peak_at)}"), table)


def _seconds(plan: Plan) -> Text:
    parts = {
        "compute": plan.compute_seconds,
        "recompute": plan.recompute_seconds,
        "stall": plan.stall_seconds,
        "compress": plan.compression_seconds,
    }
    spent = ", ".join(f"{name} {format_seconds(value)}" for name, value in parts.items() if value)
    line = _heading(f"Seconds per step, modelled: {format_seconds(plan.step_seconds)}")
    extra = sum(parts.values()) - plan.compute_seconds
    if extra:
        line.append(f"  {spent}: the plan costs {extra / sum(parts.values()):.1%} of the step", style="not bold")
    return line


def _moved(block: BlockPlan) -> Counter[Action]:
    """Bytes by action, block inputs among them."""
    sizes: Counter[Action] = Counter()
    for part in (*block.actions, *block.inputs):
        sizes[part.action] += int(part.bytes * part.fraction)
    return sizes


def _range(values: list[int]) -> str:
    low, high = format_bytes(min(values)), format_bytes(max(values))
    return low if low == high else f"{low} to {high}"


def _blocks(plan: Plan) -> list[RenderableType]:
    """One row for each run of blocks that are treated alike: by which actions take more than 1 % of their bytes."""
    if not plan.blocks:
        return []
    moved = [_moved(block) for block in plan.blocks]
    whole = sum(moved, Counter())
    used = [action for action in Action if whole[action]]
    totals = ", ".join(f"{action.value} {format_bytes(whole[action])}" for action in used)
    heading = _heading(f"What happens to the activations: {totals or 'nothing is saved'}")
    table = Table()
    table.add_column("blocks")
    for action in used:
        table.add_column(f"{action.value}, each", justify="right")

    def kind(number: int) -> tuple[bool, ...]:
        return tuple(moved[number][action] > 0.01 * sum(moved[number].values()) for action in used)

    for _, run in groupby(range(len(moved)), key=kind):
        numbers = list(run)
        first, last = plan.blocks[numbers[0]].path, plan.blocks[numbers[-1]].path
        name = first if len(numbers) == 1 else f"{first} to {last} ({len(numbers)})"
        table.add_row(name, *(_range([moved[n][action] for n in numbers]) for action in used))
    return ["", heading, table]


def _advice(plan: Plan, cure: Combination | None) -> Text:
    binding = plan.binding.split(" (")[0].replace(plan.peak_at, _words(plan.peak_at))  # the sizes stand in the table
    text = Text(f"What binds: {binding}\n")
    if plan.swap_tier != "none" and plan.swapped_bytes:
        text.append(f"Swapped per step: {format_bytes(plan.swapped_bytes)} to {plan.swap_tier}\n")
    if plan.tiles:
        kinds = Counter(tile.path.split(".")[-1] for tile in plan.tiles)
        parts = ", ".join(f"{count} x {name}" for name, count in kinds.items())
        text.append(f"In {plan.tiles[0].chunks} tiles each: {parts}; results are the plain step's up to rounding\n")
    if plan.status != "infeasible":
        proof = (
            "proven best of its model" if plan.status == "optimal" else f"at most {plan.gap:.1%} from the best bound"
        )
        text.append(f"How: {plan.method}; {proof}; solved in {format_seconds(plan.solve_seconds)}", style="dim")
        return text
    if cure is None:
        text.append("What to change: a larger budget, more devices (--data, --zero, --tensor) or a smaller --seq")
        return text
    text.append("What to change: ", style="bold")
    text.append(f"{' and '.join(cure.changes)}, then it fits at about {format_seconds(cure.step_seconds)} per step")
    text.append(" (training itself changes)\n" if cure.changes_training else "\n")
    for name, how in zip(cure.changes, cure.how, strict=True):
        text.append(f"  {name}: {how}\n")
    text.append("`--fit` works it out. Or a larger budget, or a smaller --batch or --seq.")
    return text


def placement_page(placement: Placement, buffers: int, capacity: int | None) -> Group:
    """What ``memopt place`` prints: how large the arena is, how good that is, and how it was found.

    Args:
        placement: the result.
        buffers: how many were to be placed.
        capacity: bytes that were available, or None.
    """
    placed = placement.status.value == "placed"
    line = Text(placement.status.value.upper(), style="bold green" if placed else "bold red")
    line.append(f"  {buffers} buffers", style="default")
    if capacity is not None:
        line.append(f", capacity {capacity}")
    table = Table(show_header=False)
    table.add_row("peak", f"{placement.peak} B ({format_bytes(placement.peak)})")
    table.add_row("lower bound (max-live)", f"{placement.lower_bound} B")
    table.add_row("gap", "0, proven smallest" if placement.proven else f"at most {placement.gap:.2%}")
    table.add_row("method", placement.method)
    table.add_row("time", format_seconds(placement.seconds))
    return Group(line, table, Text(placement.reason))


def fit_page(found: Fit) -> Group:
    """What ``memopt plan --fit`` found: no other choice beats these in peak and seconds; the chosen one is bold."""
    table = Table()
    for heading in ("changes", "peak", "seconds per step", "fits"):
        table.add_column(heading, justify="left" if heading == "changes" else "right")
    for one in found.pareto:
        about = "" if one.plan is not None else "about "
        table.add_row(
            ", ".join(one.changes) or "none",
            about + format_bytes(one.peak_bytes),
            about + format_seconds(one.step_seconds),
            "yes" if one.fits else "no",
            style="bold" if one == found.best else None,
        )
    return Group(_heading("Peak against seconds per step: what no other choice beats in both"), table)


def pipeline_page(stages: int, microbatches: int) -> Group:
    """What every pipeline schedule holds at its fullest rank, and its bubble.

    Args:
        stages: devices in the pipeline.
        microbatches: in one step.
    """
    table = Table()
    for heading in ("schedule", "peak (activations of a microbatch)", "bubble"):
        table.add_column(heading, justify="left" if heading == "schedule" else "right")
    for row in schedule_table(stages, microbatches):
        published = "" if row.exact else " (as published)"
        if row.published is not None:
            published = f" (published: {row.published[0]:.3g}, {row.published[1]:.1%})"
        table.add_row(row.name, f"{max(row.peak_by_rank):.3g}", f"{row.bubble:.1%}{published}")
    return Group(_heading(f"Pipeline of {stages} stages, {microbatches} microbatches"), table)
