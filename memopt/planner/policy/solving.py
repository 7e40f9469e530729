"""The policy's doors: a problem becomes a program, the program is solved, and its answer is read and checked."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

from memopt.planner.policy import cost
from memopt.planner.policy.families import add_all
from memopt.planner.policy.integers import NEAR, IntegerSearch
from memopt.planner.policy.program import Program
from memopt.planner.policy.solvers import SolverError, check_time_limit
from memopt.planner.problem import Item, Problem
from memopt.planner.values import Status

GAP = 2e-4  # of the step's seconds: far less than any model of a device can tell apart
PEAK_GAP = 0.25  # of a thousandth of the peak, where the smallest peak is sought
TRAFFIC_LIMIT = 2.0  # seconds spent on swapping less at no loss of time


@dataclass(frozen=True)
class Solution:
    """The choices taken, the seconds they add, a lower bound on those, and how it was obtained.

    ``shares`` are the variables above 0: 1 for a choice that is taken whole, less where a storage's rows are divided.
    """

    status: Status
    shares: dict[int, float]
    seconds: float
    bound_seconds: float
    method: str
    solve_seconds: float


def solve(
    problem: Problem, time_limit: float = 15.0, solver: str = "cbc", gap: float = GAP, tiled: bool = False
) -> Solution:
    """Find the cheapest fate of every item within the budget.

    Args:
        problem: what to decide.
        time_limit: seconds after which the best answer so far counts.
        solver: ``"cbc"``, ``"highs"``, or PuLP's name of another.
        gap: share of the step's seconds within which an answer counts as optimal.
        tiled: the rows of token-wise storages may be divided between choices (MEMO's alpha, one for each storage).

    Returns:
        A solution; ``infeasible`` where no choice fits the budget in the program's own terms.

    Raises:
        SolverError: the solver cannot be run or answers nonsense.
    """
    return _Run(problem, time_limit, solver, gap, seek_peak=False, tiled=tiled).solve()


def smallest_peak(
    problem: Problem, time_limit: float = 15.0, solver: str = "cbc", tiled: bool = False
) -> tuple[int, Solution]:
    """Find the choices with the smallest peak, and that peak in the program's own terms.

    The problem's budget must leave out no position that matters; 0, with which it is built, keeps them all.

    Raises:
        SolverError: as ``solve``; also where the solver answers that there is no peak, which cannot be.
    """
    run = _Run(problem, time_limit, solver, PEAK_GAP, seek_peak=True, tiled=tiled)
    solution = run.solve()
    if solution.status is Status.INFEASIBLE:
        raise SolverError(f"solver {solver!r} answered that no peak is possible")
    return math.ceil(run.peak_bytes), solution


@dataclass(frozen=True)
class Relaxation:
    """The linear relaxation's answer: a lower bound on the seconds that the choices add, or on the peak."""

    seconds: float
    peak_bytes: int


def relax(
    problem: Problem, time_limit: float = 15.0, solver: str = "cbc", seek_peak: bool = False
) -> Relaxation | None:
    """Let every choice be taken in part: the least seconds within the budget, or with ``seek_peak`` the least peak.

    None where even that cannot be had.
    """
    return _Run(problem, time_limit, solver, GAP, seek_peak, tiled=False).relax()


class _Run:
    """One program on its way to an answer."""

    def __init__(
        self, problem: Problem, time_limit: float, solver: str, gap: float, seek_peak: bool, tiled: bool
    ) -> None:
        self.problem, self.gap, self.seek_peak = problem, gap, seek_peak
        self.began = time.monotonic()
        self.peak_bytes = 0.0
        deadline = self.began + check_time_limit(time_limit)
        self.program = program = _program(problem, seek_peak)
        self.divided = {
            program.choices[c.variable].name
            for block in problem.blocks
            for item in block.items
            if tiled and item.token_wise
            for c in item.choices
        }
        self.search = IntegerSearch(program, self.divided, solver, gap, deadline)

    def solve(self) -> Solution:
        """Relax, fix what is decided, solve the rest; then, at no loss of time, swap as little as possible."""
        status, method = self.search.minimise(prove=not self.seek_peak)
        if status is Status.INFEASIBLE:
            return Solution(status, {}, math.inf, math.inf, method, time.monotonic() - self.began)
        answer = self._solution(status, method)
        swapped = sum(c.swap_bytes for c in self.program.all_choices() if c.variable in answer.shares)
        if not swapped or self.seek_peak or not self.problem.rates.overlap or self.search.left() < 1:
            return answer
        share = answer.seconds / self.problem.compute_seconds
        self.program.add(cost.seconds(self.program) <= share + self.gap / 10)
        self.program.model.setObjective(cost.traffic(self.program))
        self.search.deadline = min(self.search.deadline, time.monotonic() + TRAFFIC_LIMIT)
        try:
            status, _ = self.search.minimise(prove=False)
            if status is Status.INFEASIBLE:
                return answer
            least = self._solution(status, method + ", then least traffic")
        except SolverError:
            return answer
        return replace(least, status=answer.status, bound_seconds=answer.bound_seconds)

    def relax(self) -> Relaxation | None:
        """The linear relaxation alone."""
        if self.search.relax() is Status.INFEASIBLE:
            return None
        seconds = float(cost.seconds(self.program).value()) * self.problem.compute_seconds
        peak = self.problem.budget_bytes
        if self.program.peak is not None:
            peak = math.ceil(float(self.program.peak.varValue) * self.program.unit_bytes)
        return Relaxation(seconds, peak)

    def _solution(self, status: Status, method: str) -> Solution:
        shares = {}
        for block in self.problem.blocks:
            for item in block.items:
                if self.program.choices[item.choices[0].variable].name in self.divided:
                    shares.update(self._divided(block.block, item))
                    continue
                best = max(item.choices, key=lambda c: self.program.choices[c.variable].varValue or 0.0)
                if not 0.999 <= (self.program.choices[best.variable].varValue or 0.0) <= 1.001:
                    raise SolverError(
                        f"solver {self.search.solver!r} answered no integers for block {block.block}, item {item.index}"
                    )
                shares[best.variable] = 1.0
        if self.program.peak is not None:
            self.peak_bytes = float(self.program.peak.varValue) * self.program.unit_bytes
        seconds = float(cost.seconds(self.program).value()) * self.problem.compute_seconds
        over = max(0.0, self.search.objective() - self.search.bound)
        if status is Status.OPTIMAL and over > 2 * self.gap:
            status = Status.FEASIBLE
        lower = max(0.0, seconds - over * self.problem.compute_seconds)
        return Solution(status, shares, seconds, lower, method, time.monotonic() - self.began)

    def _divided(self, block: int, item: Item) -> dict[int, float]:
        """The shares of a storage whose rows are divided; they add up to 1 exactly."""
        found = {c.variable: float(self.program.choices[c.variable].varValue or 0.0) for c in item.choices}
        if abs(sum(found.values()) - 1) > 1e-3 or min(found.values()) < -1e-3:
            raise SolverError(f"solver {self.search.solver!r} answered no shares for block {block}, item {item.index}")
        found = {variable: share for variable, share in found.items() if share > NEAR}
        whole = sum(found.values())
        return {variable: share / whole for variable, share in found.items()}


def _program(problem: Problem, seek_peak: bool) -> Program:
    """The whole program: variables, every family of constraints, and what to minimise."""
    import pulp

    most = max((position.fixed_bytes for position in problem.positions), default=1)
    unit_bytes = max(most, problem.budget_bytes, 1) / 1024
    program = Program(problem, pulp.LpProblem("policy", pulp.LpMinimize), unit_bytes, problem.compute_seconds)
    program.choices = {c.variable: program.continuous(f"x{c.variable}", 0, 1) for c in program.all_choices()}
    useful = _useful_resources(problem)
    program.resources = {
        r.variable: program.continuous(f"y{r.variable}", 0, 1) for r in program.all_resources() if r.variable in useful
    }
    if seek_peak:
        program.peak = program.continuous("peak")
    add_all(program)
    objective = cost.step_cost(program)
    program.model.setObjective(program.peak + 1e-4 * objective if seek_peak else objective)
    return program


def _useful_resources(problem: Problem) -> frozenset[int]:
    """The resources that cost seconds, hold bytes at some position, or come before one that does."""
    found = {variable for position in problem.positions for variable, _ in position.terms}
    for block in problem.blocks:
        found |= {r.variable for r in block.resources if r.seconds or r.held_bytes}
        for rule in reversed(block.together):
            if rule.after is not None and rule.variable in found:
                found.add(rule.after)
    return frozenset(found)
