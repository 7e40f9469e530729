"""``fit``: which combination of optimizer state, gradient release, chunked loss and offload fits at the least cost."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from memopt.planner.changes import (
    Change,
    chunked_loss,
    offload_state,
    one_block_at_a_time,
    release_gradients,
    state_bits,
)
from memopt.planner.plan_file import Plan
from memopt.planner.planning import DEFAULT_ACTIONS, plan
from memopt.planner.presets import ModelError
from memopt.planner.rates import HardwareLike, rates_of
from memopt.planner.units import BudgetError, parse_bytes
from memopt.planner.values import Action, Category, Status, Trace

# Bytes of state per traced byte of a 32-bit one, scales included.
STATES = {"as traced": 1.0, "8bit state": 8.125 / 32, "4bit state": 4.25 / 32}


@dataclass(frozen=True)
class Combination:
    """One way to fit: the changes made, the plan for what remains, and the modelled seconds of the step with them."""

    changes: tuple[str, ...]
    plan: Plan
    step_seconds: float
    changes_training: bool


@dataclass(frozen=True)
class Fit:
    """``best`` is the cheapest combination that fits, None where none does; ``pareto`` trades peak against seconds."""

    best: Combination | None
    pareto: tuple[Combination, ...]
    tried: tuple[Combination, ...]


def fit(
    trace: Trace,
    budget: int | str,
    hardware: HardwareLike = "auto",
    *,
    actions: Iterable[Action | str] = DEFAULT_ACTIONS,
    allow_block_coordinate: bool = False,
    time_limit: float = 4.0,
) -> Fit:
    """Find the cheapest combination of choices beyond activations that makes a traced step fit.

    Combinations are tried from few changes to many. Where two cost the same, fewer changes win, and what changes
    training itself (block-coordinate updates) is only tried when allowed, and taken when nothing else fits.

    Args:
        trace: of the step with a 32-bit optimizer state.
        budget: bytes of the whole step on one device.
        hardware: as for ``plan``.
        actions: what plans may do with activations.
        allow_block_coordinate: whether one block may be trained at a time.
        time_limit: seconds for each plan.

    Raises:
        BudgetError: the budget cannot be read or lies below the weights alone.
    """
    limit, rates, allowed = parse_bytes(budget), rates_of(hardware, trace.dtype), list(actions)
    has_state = any(s.category is Category.OPTIMIZER for s in trace.storages)
    tried: list[Combination] = []
    for combination in _combinations(has_state, allow_block_coordinate):
        if any(set(c.changes) <= {x.name for x in combination} and _free(c) for c in tried):
            continue  # already fits without any cost, with fewer changes
        changed, extra = trace, 0.0
        for change in combination:
            extra += change.seconds(changed, rates)
            changed = change.apply(changed)
        if extra == float("inf"):
            continue
        found = plan(changed, limit, rates, actions=allowed, time_limit=time_limit)
        names = tuple(change.name for change in combination)
        alters = any(change.changes_training for change in combination)
        tried.append(Combination(names, found, found.step_seconds + extra, alters))
    fitting = [c for c in tried if c.plan.status is not Status.INFEASIBLE]
    best = min(fitting, key=lambda c: (c.changes_training, round(c.step_seconds, 6), len(c.changes)), default=None)
    return Fit(best, pareto_front(tried), tuple(tried))


def pareto_front(combinations: Iterable[Combination]) -> tuple[Combination, ...]:
    """Those that no other beats in both peak and seconds, from the smallest peak to the fastest."""
    ordered = sorted(combinations, key=lambda c: (c.plan.peak_bytes, c.step_seconds, len(c.changes)))
    front: list[Combination] = []
    for one in ordered:
        if not front or one.step_seconds < front[-1].step_seconds - 1e-9:
            front.append(one)
    return tuple(front)


def _free(combination: Combination) -> bool:
    found = combination.plan
    no_cost = combination.step_seconds <= found.compute_seconds * (1 + 1e-4)
    return found.status is not Status.INFEASIBLE and no_cost


def _combinations(has_state: bool, allow_block_coordinate: bool) -> list[tuple[Change, ...]]:
    """Every combination, those with fewer changes first."""
    states = [state_bits(name, share) for name, share in STATES.items() if share < 1] if has_state else []
    axes: list[list[Change | None]] = [
        [None, *states, *([offload_state()] if has_state else [])],
        [None, release_gradients()],
        [None, chunked_loss()],
        [None, *([one_block_at_a_time()] if allow_block_coordinate else [])],
    ]
    every = [tuple(change for change in pick if change is not None) for pick in itertools.product(*axes)]
    return sorted(every, key=lambda pick: (any(c.changes_training for c in pick), len(pick)))


def largest_that_fits(
    make_trace: Callable[[int], Trace],
    budget: int | str,
    hardware: HardwareLike = "auto",
    *,
    step: int = 1,
    most: int = 2**24,
    exact: bool = False,
    actions: Iterable[Action | str] = DEFAULT_ACTIONS,
) -> tuple[int, Plan | None]:
    """The largest batch or sequence length that fits, by doubling and then halving the interval.

    Args:
        make_trace: from a size to the trace of its step.
        budget: bytes of the whole step.
        hardware: as for ``plan``.
        step: sizes are multiples of it.
        most: the largest size tried.
        exact: halve down to one ``step``; otherwise to about a sixteenth of the size.
        actions: what plans may do.

    Returns:
        The size and its plan; (0, None) where not even ``step`` fits.
    """
    if step < 1 or most < step:
        raise ValueError(f"step is {step} and most {most}; they must be 1 <= step <= most")
    rates_by_dtype: dict[str, object] = {}
    allowed = list(actions)

    def attempt(size: int) -> Plan | None:
        try:
            made = make_trace(size)
            rates = rates_by_dtype.setdefault(made.dtype, rates_of(hardware, made.dtype))
            found = plan(made, budget, rates, actions=allowed)  # type: ignore[arg-type]
        except BudgetError:
            return None
        except ModelError:
            if size == step:
                raise
            return None  # longer than the model's own positions, say
        return None if found.status is Status.INFEASIBLE else found

    parse_bytes(budget)
    low, low_plan = 0, None
    high = step
    while high <= most and (found := attempt(high)) is not None:
        low, low_plan, high = high, found, high * 2
    high = min(high, most + step)
    while high - low > (step if exact else max(step, low // 16)):
        middle = (low + high) // 2 // step * step
        if middle in (low, high):
            break
        found = attempt(middle)
        if found is None:
            high = middle
        else:
            low, low_plan = middle, found
    return low, low_plan
