"""``fit``: which combination of optimizer state, gradient release, chunked loss and offload fits at the least cost."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf

from memopt.planner.devices import HardwareLike, Rates, rates_of
from memopt.planner.models import ModelError
from memopt.planner.plan_file import Plan
from memopt.planner.planning.answering import weight_bytes
from memopt.planner.planning.deciding import DEFAULT_ACTIONS, estimate, plan
from memopt.planner.units import parse_bytes
from memopt.planner.values import Action, Category, Status, Trace
from memopt.planner.variants import (
    STATES,
    Change,
    change,
    chunked_loss,
    live_bytes,
    offload_state,
    one_block_at_a_time,
    release_gradients,
)

SAME = 0.01  # combinations whose steps differ by less cost the same: no model of a device tells them apart


@dataclass(frozen=True)
class Combination:
    """One way to fit: the changes made, and the peak and seconds of the step with them and the best plan for it.

    Without a ``plan`` the figures are the linear relaxation's: no plan can be better, few are much worse.

    Attributes:
        changes: what is done beside a plan, in words.
        fits: whether the step stays within the budget.
        peak_bytes: of the step.
        step_seconds: of the step, modelled.
        changes_training: whether results differ from those of plain training.
        plan: for the activations, or None.
        how: for each change what makes it in a training script.
    """

    changes: tuple[str, ...]
    fits: bool
    peak_bytes: int
    step_seconds: float
    changes_training: bool
    plan: Plan | None = None
    how: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fit:
    """The combinations that :func:`fit` has looked at.

    Attributes:
        best: the cheapest that fits, None where none does.
        pareto: those that trade peak against seconds.
        tried: all of them.
    """

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
    time_limit: float = 10.0,
) -> Fit:
    """Find the cheapest combination of choices beyond activations that makes a traced step fit.

    Every combination is estimated; the cheapest of those that fit is planned. Where two cost the same (within 1 %),
    fewer changes win. What changes training itself (block-coordinate updates) is only tried when allowed, and taken
    when nothing else fits.

    Args:
        trace: of the step; its ``meta`` says how many bits its optimizer state has (32 where it does not).
        budget: bytes of the whole step on one device.
        hardware: as for ``plan``.
        actions: what plans may do with activations.
        allow_block_coordinate: whether one block may be trained at a time.
        time_limit: seconds for each plan that is worked out.

    Raises:
        BudgetError: the budget cannot be read.
    """
    limit, rates, allowed = parse_bytes(budget), rates_of(hardware, trace.dtype), list(actions)
    tried = list(estimates(trace, limit, rates, actions=allowed, allow_block_coordinate=allow_block_coordinate))
    while (best := cheapest(tried)) is not None and best.plan is None:
        changed, extra = _changed(trace, rates, _named(trace, best.changes))
        found = plan(changed, limit, rates, actions=allowed, time_limit=time_limit)
        tried[tried.index(best)] = Combination(
            best.changes,
            found.status is not Status.INFEASIBLE,
            found.peak_bytes,
            found.step_seconds + extra,
            best.changes_training,
            found,
            best.how,
        )
    return Fit(best, pareto_front(tried), tuple(tried))


def estimates(
    trace: Trace,
    budget: int | str,
    hardware: HardwareLike = "auto",
    *,
    actions: Iterable[Action | str] = DEFAULT_ACTIONS,
    allow_block_coordinate: bool = False,
) -> tuple[Combination, ...]:
    """What each combination of changes would come to, without working out plans; arguments as for ``fit``.

    Left out are combinations that cannot fit because one with fewer changes lacks more than the others free, and those
    that add changes to one that already fits at no cost; all of them where the weights alone exceed the budget.
    """
    limit, rates, allowed = parse_bytes(budget), rates_of(hardware, trace.dtype), list(actions)
    tried: list[Combination] = []
    if limit < weight_bytes(trace):
        return ()
    for combination in _combinations(trace, allow_block_coordinate):
        names = tuple(one.name for one in combination)
        changed, extra = _changed(trace, rates, combination)
        if extra == inf or any(_settles(one, names, trace, rates, limit) for one in tried):
            continue
        fits, peak, seconds = estimate(changed, limit, rates, actions=allowed)
        alters = any(one.changes_training for one in combination)
        how = tuple(one.how for one in combination)
        tried.append(Combination(names, fits, peak, seconds + extra, alters, how=how))
    return tuple(tried)


def cheapest(combinations: Iterable[Combination]) -> Combination | None:
    """Of those that fit and leave training as it is, or else of all that fit: fewest changes among the fastest."""
    fitting = [one for one in combinations if one.fits]
    exact = [one for one in fitting if not one.changes_training] or fitting
    least = min((one.step_seconds for one in exact), default=0.0)
    near = [one for one in exact if one.step_seconds <= least * (1 + SAME)]
    return min(near, key=lambda one: len(one.changes), default=None)


def pareto_front(combinations: Iterable[Combination]) -> tuple[Combination, ...]:
    """Those that no other beats in both peak and seconds, from the smallest peak to the fastest."""
    ordered = sorted(combinations, key=lambda c: (c.peak_bytes, c.step_seconds, len(c.changes)))
    front: list[Combination] = []
    for one in ordered:
        if not front or one.step_seconds < front[-1].step_seconds - 1e-9:
            front.append(one)
    return tuple(front)


def _changed(trace: Trace, rates: Rates, changes: Iterable[Change]) -> tuple[Trace, float]:
    """The step with some changes made, and the seconds that these add."""
    extra = 0.0
    for one in changes:
        extra += one.seconds(trace, rates)
        trace = one.apply(trace)
    return trace, extra


def _settles(one: Combination, names: tuple[str, ...], trace: Trace, rates: Rates, limit: int) -> bool:
    """Whether a combination with fewer changes shows that one is not worth a look."""
    if not set(one.changes) <= set(names):
        return False
    if one.fits:
        compute = sum(rates.seconds(op.flops, op.bytes_read + op.bytes_written) for op in trace.ops)
        return one.step_seconds <= compute * (1 + 1e-4)
    before, _ = _changed(trace, rates, _named(trace, one.changes))
    after, _ = _changed(trace, rates, _named(trace, names))
    return one.peak_bytes - int((live_bytes(before) - live_bytes(after)).max()) > limit


def _named(trace: Trace, names: Iterable[str]) -> list[Change]:
    return [change(name, _state_bits(trace)) for name in names]


def _state_bits(trace: Trace) -> float:
    return float(trace.meta.get("state_bits", 32))


def _combinations(trace: Trace, allow_block_coordinate: bool) -> list[tuple[Change, ...]]:
    """Every combination, those with fewer changes first."""
    has_state = any(s.category is Category.OPTIMIZER for s in trace.storages)
    traced = _state_bits(trace)
    states = [change(name, traced) for name, bits in STATES.items() if bits < traced] if has_state else []
    axes: list[list[Change | None]] = [
        [None, chunked_loss()],
        [None, *states, *([offload_state()] if has_state else [])],
        [None, *([release_gradients()] if trace.meta.get("gradients") != "released" else [])],
        [None, *([one_block_at_a_time()] if allow_block_coordinate else [])],
    ]
    every = [tuple(one for one in pick if one is not None) for pick in itertools.product(*axes)]
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
