"""Checks a plan by simulating what the runtime does, operation by operation and storage by storage.

Slow and obvious on purpose: it shares no code with the problem, the program or the solver.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from memopt.planner.devices import HardwareLike, rates_of
from memopt.planner.plan_file import Plan, Timeline, model_signature
from memopt.planner.validation.simulating import simulate
from memopt.planner.validation.simulation import Simulation
from memopt.planner.values import Action, BlockPlan, Phase, SavedStorage, StorageAction, Trace


@dataclass(frozen=True)
class Validation:
    """What a simulation of a plan found.

    Attributes:
        broken: the rule that the plan breaks, in words; None where it keeps all of them.
        peak_bytes: of the step.
        peak_at: the operation at the peak.
        by_category: the bytes at the peak.
        timeline: live bytes after every operation.
        simulation: everything that was simulated; None where the plan does not fit the trace.
    """

    broken: str | None
    peak_bytes: int
    peak_at: str
    by_category: dict[str, int]
    timeline: Timeline
    simulation: Simulation | None


def validate(trace: Trace, plan: Plan, hardware: HardwareLike | None = None) -> Validation:
    """Simulate a plan on its trace and check every promise it makes.

    Rules: made for this trace; no block call planned twice (one without a plan is kept); every saved storage has one
    fate, or shares that add up to 1; shares of rows only where a storage is token-wise; inputs kept or swapped, and
    swapped only where nothing else needs them; sizes as traced; nothing recomputed that no operation of the block
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
    blocks: defaultdict[tuple[str, int], list[int]] = defaultdict(list)  # one for each accumulated pass
    for number, block in enumerate(trace.blocks):
        blocks[block.path, block.call].append(number)
    seen = set()
    for plan in plans:
        name = f"block {plan.path} (call {plan.call})"
        if (plan.path, plan.call) not in blocks:
            return f"{name} is not in the trace"
        if (plan.path, plan.call) in seen:
            return f"{name} is planned twice"
        seen.add((plan.path, plan.call))
        for number in blocks[plan.path, plan.call]:
            broken = _broken_block(name, trace, number, plan)
            if broken is not None:
                return broken
    return None


def _broken_block(name: str, trace: Trace, number: int, plan: BlockPlan) -> str | None:
    """The first rule that a block's actions break."""
    block = trace.blocks[number]
    if plan.signature != block.signature:
        return f"{name} has signature {block.signature}, the plan was made for {plan.signature}"
    named = {action.index for action in plan.inputs}
    inputs = tuple(saved for saved in block.saved_inputs if saved.index in named)
    broken = _broken_actions(f"{name}: saved storage", block.saved, plan.actions)
    broken = broken or _broken_actions(f"{name}: saved input", inputs, plan.inputs)
    return broken or _broken_inputs(name, trace, number, plan.inputs)


def _broken_actions(name: str, storages: tuple[SavedStorage, ...], actions: tuple[StorageAction, ...]) -> str | None:
    """Every storage has one fate, or shares that add up, of the size that it has."""
    shares: defaultdict[int, float] = defaultdict(float)
    saved = {one.index: one for one in storages}
    for action in actions:
        one = f"{name} {action.index}"
        if action.index not in saved:
            return f"{one} is not in the trace"
        if action.bytes != saved[action.index].bytes:
            return f"{one} has {saved[action.index].bytes} bytes, not {action.bytes}"
        if not 0 <= action.fraction <= 1:
            return f"{one} has the fraction {action.fraction}"
        if (action.format is None) == (action.action is Action.COMPRESS):
            return f"{one}: a format is for compressed storages, and for them a must"
        if action.action is Action.RECOMPUTE and action.fraction < 1 and not saved[action.index].token_wise:
            return f"{one} is recomputed in part, but its rows do not follow from rows"
        shares[action.index] += action.fraction
    for index in saved:
        if abs(shares[index] - 1) > 1e-9:
            return f"{name} {index}: its fates cover {shares[index]:.6g} of it, not all of it once"
    return None


def _broken_inputs(name: str, trace: Trace, number: int, actions: tuple[StorageAction, ...]) -> str | None:
    """Inputs are kept, or swapped where no one else needs them."""
    by_index = {one.index: one.storage for one in trace.blocks[number].saved_inputs}
    storages = {storage.id: storage for storage in trace.storages}
    for action in actions:
        if action.action is Action.KEEP:
            continue
        one, storage = f"{name}: saved input {action.index}", by_index[action.index]
        if action.action is not Action.SWAP:
            return f"{one} has the action {action.action.value}; inputs can be kept or swapped"
        for n, other in enumerate(trace.blocks):
            if n != number and any(s.storage == storage for s in (*other.saved, *other.saved_inputs)):
                return f"{one} is swapped, but block {other.path} (call {other.call}) saves it too"
        backward = [op for op in trace.ops if op.phase is Phase.BACKWARD and storage in (*op.reads, *op.writes)]
        held = storages[storage].producer is None or storages[storage].death > trace.blocks[number].backward[1]
        if held or any(op.block != number for op in backward):
            return f"{one} is swapped, but it is needed outside the block"
    return None
