"""``plan``: from a trace, a budget and a device to a plan that has been simulated before anyone sees it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

from memopt.planner.devices import HardwareLike, Rates, rates_of
from memopt.planner.plan_file import Plan
from memopt.planner.planning.answering import Answer, assemble, weight_bytes
from memopt.planner.policy import Solution, SolverError, relax, smallest_peak, solve
from memopt.planner.policy.solvers import check_time_limit
from memopt.planner.policy.solving import GAP
from memopt.planner.problem import Choice, Problem, build, is_steady
from memopt.planner.units import parse_bytes
from memopt.planner.validation import simulate, validate
from memopt.planner.values import Action, BlockPlan, SavedStorage, Status, StorageAction, Trace
from memopt.planner.variants import last_pass

DEFAULT_ACTIONS = (Action.KEEP, Action.SWAP, Action.RECOMPUTE)
CLOSE = 0.002  # of the budget: a peak so little below it leaves nothing to gain
Shared = tuple[Choice, float]  # a choice taken for a share of a storage
ROUNDS = 6  # solves with a corrected target, until the program's memory and the simulation's agree


def plan(
    trace: Trace,
    budget: int | str | None = None,
    hardware: HardwareLike = "auto",
    *,
    actions: Iterable[Action | str] = DEFAULT_ACTIONS,
    time_limit: float = 10.0,
    solver: str = "cbc",
) -> Plan:
    """Decide what happens to every saved storage of a traced step, so that the step fits and costs the least seconds.

    Args:
        trace: what ``memopt.trace`` returned.
        budget: bytes of the whole step on one device, as an integer or text such as ``"24GiB"``; None: no limit.
        hardware: ``"auto"`` for this machine, a name from the table, a JSON file, or a ``Hardware``.
        actions: what may be done; ``"compress"`` is lossy and so only done when named.
        time_limit: seconds for all solves together; the best answer so far counts when they are over. The search for
            the smallest budget, where nothing was found that fits, has as many of its own.
        solver: ``"cbc"`` (bundled), ``"highs"``, or PuLP's name of another.

    Returns:
        A plan that ``validate`` has passed. With status ``"infeasible"`` it has no actions, but
        ``smallest_budget_bytes`` and ``binding``.

    Raises:
        BudgetError: a budget that cannot be read.
        ValueError: an unknown hardware or action.
        SolverError: the solver cannot be run, or found nothing within ``time_limit``.
    """
    began = time.monotonic()
    allowed = _actions(actions)
    budget_bytes = None if budget is None else parse_bytes(budget)
    rates = rates_of(hardware, trace.dtype)
    planner = _Planner(trace, rates, allowed, time_limit, solver)
    baseline = simulate(trace, (), rates)
    if budget_bytes is None or baseline.peak_bytes <= budget_bytes:
        kept = planner.block_plans({})
        answer: Answer | None = Answer(kept, baseline, None, "everything fits as it is")
    elif budget_bytes < weight_bytes(trace):
        answer = None
    else:
        answer = planner.within(budget_bytes)
    smallest = None
    status, gap = Status.OPTIMAL, 0.0
    if answer is None:
        status, smallest = Status.INFEASIBLE, planner.smallest()
        shown = Answer((), smallest.simulation, smallest.solution, smallest.method)
    else:
        shown = answer
        if answer.solution is not None:
            gap = planner.gap(answer)
            status = Status.OPTIMAL if gap <= 2 * GAP else Status.FEASIBLE
    found = assemble(trace, rates, budget_bytes, baseline, shown, status, gap, planner.passes, time.monotonic() - began)
    if status is not Status.INFEASIBLE:
        broken = validate(trace, found, rates).broken
        if broken is not None:
            raise SolverError(f"the plan breaks a rule and is withheld: {broken}")
    return found


def estimate(
    trace: Trace,
    budget: int,
    rates: Rates,
    *,
    actions: Iterable[Action | str] = DEFAULT_ACTIONS,
    solver: str = "cbc",
) -> tuple[bool, int, float]:
    """What a plan could come to at best, from the linear relaxation alone: whether one may fit, its peak and seconds.

    Where none fits, the peak is the smallest that the relaxation allows, and the seconds are of that.
    """
    baseline = simulate(trace, (), rates)
    if baseline.peak_bytes <= budget:
        return True, baseline.peak_bytes, baseline.step_seconds
    last, passes = last_pass(trace)
    problem = build(last, rates, _actions(actions))
    found = relax(problem.within(budget), solver=solver)
    if found is not None:
        return True, budget, baseline.compute_seconds + passes * found.seconds
    smallest = relax(problem, solver=solver, seek_peak=True)
    if smallest is None:
        raise SolverError(f"solver {solver!r} answered that no peak is possible")
    seconds = baseline.compute_seconds + passes * smallest.seconds
    return False, min(baseline.peak_bytes, smallest.peak_bytes), seconds


def _actions(actions: Iterable[Action | str]) -> frozenset[Action]:
    names = [actions] if isinstance(actions, str) else list(actions)
    known = [action.value for action in Action]
    for name in names:
        if name not in known:
            raise ValueError(f"actions has {name!r}; the actions are {', '.join(known)}")
    return frozenset(Action(name) for name in names) | {Action.KEEP}


class _Planner:
    """The rounds of solving and simulating for one trace on one device."""

    def __init__(self, trace: Trace, rates: Rates, actions: frozenset[Action], time_limit: float, solver: str) -> None:
        self.trace, self.rates, self.actions = trace, rates, actions
        self.last, self.passes = last_pass(trace)
        self.limit, self.solver = check_time_limit(time_limit), solver
        self.deadline = time.monotonic() + self.limit
        self.bound_seconds: float | None = None
        self._smallest: Answer | None = None

    @cached_property
    def problem(self) -> Problem:
        """The problem, built when first needed."""
        return build(self.last, self.rates, self.actions)

    def left(self) -> float:
        """Seconds that the next solve may take."""
        return max(0.5, self.deadline - time.monotonic())

    def block_plans(self, chosen: Mapping[tuple[int, int], Sequence[Shared]]) -> tuple[BlockPlan, ...]:
        """Plans for every block call that saves the same in every step; what was not decided about is kept."""
        plans = []
        for n, block in enumerate(self.last.blocks):
            if not is_steady(self.last, block):
                continue
            own = [part for saved in block.saved for part in _parts(saved, chosen.get((n, saved.index), ()))]
            given = [
                part
                for saved in block.saved_inputs
                if (taken := chosen.get((n, len(block.saved) + saved.index)))
                for part in _parts(saved, taken)
            ]
            plans.append(BlockPlan(block.path, block.call, block.signature, tuple(own), tuple(given)))
        return tuple(plans)

    def within(self, budget_bytes: int) -> Answer | None:
        """The cheapest policy whose simulated peak is within the budget; None where none was found.

        The program's memory is a close upper bound of the simulation's in most places. Where it is not, the target
        handed to the solver moves by the difference and the solver tries again.
        """
        target, best, raised = budget_bytes, None, False
        for _ in range(ROUNDS):
            problem = self.problem.within(target)
            try:
                solution = solve(problem, self.left(), self.solver)
            except SolverError:  # such as nothing found in time; the smallest peak is an answer wherever it fits
                if best is None and self.smallest().simulation.peak_bytes > budget_bytes:
                    raise
                break
            if solution.status is Status.INFEASIBLE:
                break
            if target == budget_bytes:
                self.bound_seconds = solution.bound_seconds
            answer = self._play(problem, solution)
            over = answer.simulation.peak_bytes - budget_bytes
            if over <= 0 and (best is None or _cost(answer) < _cost(best)):
                best = answer
            done = best is not None and (raised or over > 0 or self.gap(best) <= GAP or self.left() < 3)
            if done or -CLOSE * budget_bytes <= over <= 0:
                break
            raised = over < 0
            target -= over
            if target <= 0:
                break
        if best is None:
            last = self.smallest()
            best = last if last.simulation.peak_bytes <= budget_bytes else None
        return best

    def smallest(self) -> Answer:
        """The policy with the smallest peak that was found, with the whole time for it: so it is found again where a
        budget is what an earlier plan has called the smallest.
        """
        if self._smallest is not None:
            return self._smallest
        _, solution = smallest_peak(self.problem, self.limit, self.solver)
        kept = simulate(self.trace, (), self.rates)
        answer = self._play(self.problem, solution)
        if kept.peak_bytes <= answer.simulation.peak_bytes:
            answer = Answer(self.block_plans({}), kept, solution, "nothing saves memory here")
        self._smallest = answer
        return answer

    def _play(self, problem: Problem, solution: Solution) -> Answer:
        shares = solution.shares
        chosen = {
            (block.block, item.index): [(c, shares[c.variable]) for c in item.choices if c.variable in shares]
            for block in problem.blocks
            for item in block.items
        }
        plans = self.block_plans(chosen)
        return Answer(plans, simulate(self.trace, plans, self.rates), solution, solution.method)

    def gap(self, answer: Answer) -> float:
        """How much faster the step could be at most, by the first solve's bound for the budget as given."""
        spent = answer.simulation.step_seconds
        best = answer.simulation.compute_seconds + self.passes * (self.bound_seconds or 0.0)
        return max(0.0, (spent - best) / spent) if spent > 0 else 0.0


def _parts(saved: SavedStorage, taken: Sequence[Shared]) -> list[StorageAction]:
    """What the choices taken do with a saved storage, share by share; kept without any."""
    shares: dict[tuple[Action, str | None], float] = {}
    for choice, share in taken:
        for action, format, part in (
            (choice.action, choice.format, share * choice.fraction),
            (Action.KEEP, None, share * (1 - choice.fraction)),
        ):
            if part > 0:
                shares[action, format] = shares.get((action, format), 0.0) + part
    if not shares:
        return [StorageAction(saved.index, saved.bytes, Action.KEEP)]
    return [StorageAction(saved.index, saved.bytes, a, share, format) for (a, format), share in shares.items()]


def _cost(answer: Answer) -> tuple[float, int]:
    return answer.simulation.step_seconds, answer.simulation.swapped_bytes
