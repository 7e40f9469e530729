"""From a program's linear relaxation to integers: fix what is decided, solve the rest, then close the gap.

The linear program gives a lower bound. Variables that it leaves at 0 or 1 are fixed there, and the few others are
solved in integers. Where that leaves a gap, every variable whose reduced cost is within the gap is set free again and
the program solved once more, which proves the answer.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections.abc import Callable, Set

from memopt.planner.policy.program import Program
from memopt.planner.policy.solvers import SolverError, open_solver
from memopt.planner.values import Status

PROOF_LIMIT = 1.5  # seconds for each attempt to improve or prove an answer that is there already
FREE_LIMITS = (150, 400)  # variables set free in those attempts
WHOLE_LIMIT = 5.0  # seconds spent on the whole program where fixing the relaxation's decisions led nowhere
NEAR = 1e-6  # a relaxed variable so close to an integer counts as one


class IntegerSearch:
    """Solves one program, whatever its objective is at the time; the answer is left in its variables.

    Args:
        program: what to solve.
        divided: names of the variables that may stay between 0 and 1.
        solver: as ``open_solver`` takes it.
        gap: in the objective's unit; answers so close to the bound count as optimal.
        deadline: where ``time.monotonic()`` has to stop it; may be moved between calls.
    """

    def __init__(self, program: Program, divided: Set[str], solver: str, gap: float, deadline: float) -> None:
        self.program = program
        self.divided = divided
        self.solver = solver
        self.gap = gap
        self.deadline = deadline
        self.bound = 0.0

    def minimise(self, prove: bool = True) -> tuple[Status, str]:
        """Solve in integers; how it was done. ``bound`` becomes a lower bound, with ``prove`` a close one."""
        choices = list(self.program.choices.values())
        for variable in choices:
            variable.cat, variable.lowBound, variable.upBound = "Continuous", 0, 1
        if self.relax() is Status.INFEASIBLE:
            return Status.INFEASIBLE, "the linear relaxation is infeasible"
        self.bound = self.objective()
        relaxed = {variable.name: (variable.varValue, variable.dj or 0.0) for variable in choices}
        free = self._fix(lambda value, _: True, relaxed)
        status = self._call(integer=True, limit=WHOLE_LIMIT)
        if status is Status.INFEASIBLE:
            free = self._fix(lambda *_: False, relaxed)
            status = self._call(integer=True, limit=WHOLE_LIMIT)
            if status is Status.OPTIMAL:
                self.bound = max(self.bound, self.objective() - self.gap)
        elif prove:
            free, status = self._improve(relaxed, free)
        method = f"linear relaxation, then a mixed-integer program over the {free} undecided of {len(choices)} choices"
        return status, method

    def relax(self) -> Status:
        """Solve with every variable continuous."""
        return self._call(integer=False)

    def objective(self) -> float:
        """What is minimised, at the answer."""
        return float(self.program.model.objective.value())

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def _improve(self, relaxed: dict[str, tuple[float, float]], free: int) -> tuple[int, Status]:
        """Sets more variables free, those that cost least to move first, until the gap is closed or time is up.

        In an answer better than the best known, whatever costs more than the difference when moved stays where it is:
        once all others are free, the solver's word is a proof.
        """
        prices = sorted(abs(price) for _, price in relaxed.values())
        for limit in FREE_LIMITS:
            best = self.objective()
            room = best - self.bound
            if room <= self.gap or self.left() < 1:
                break
            proof = bisect_right(prices, room) <= limit
            threshold = room if proof else prices[min(limit, len(prices) - 1)]
            values = {variable.name: variable.varValue for variable in self.program.model.variables()}
            opened = self._fix(lambda _, price, most=threshold: abs(price) > most, relaxed)  # type: ignore[misc]
            try:
                status = self._call(integer=True, limit=PROOF_LIMIT, start=True)
            except SolverError:
                status = Status.INFEASIBLE
            if status is Status.INFEASIBLE or self.objective() > best:
                self._restore(values)
            else:
                free = opened
            if status is Status.OPTIMAL and proof:
                self.bound = max(self.bound, self.objective() - self.gap)
        return free, Status.OPTIMAL

    def _restore(self, values: dict[str, float | None]) -> None:
        for variable in self.program.model.variables():
            variable.varValue = values[variable.name]

    def _fix(self, decided: Callable[[float, float], bool], relaxed: dict[str, tuple[float, float]]) -> int:
        """Makes the choices integer and fixes those that ``decided(value, price)`` holds for; counts the others.

        All choices of an item stay free where the relaxation has split it between some of them.
        """
        program = self.program
        split = {
            program.choices[c.variable].name
            for block in program.problem.blocks
            for item in block.items
            if any(not _whole(relaxed[program.choices[c.variable].name][0]) for c in item.choices)
            for c in item.choices
        }
        free = 0
        for variable in program.choices.values():
            if variable.name in self.divided:
                continue
            value, price = relaxed[variable.name]
            fixed = variable.name not in split and decided(value, price)
            variable.cat = "Integer"
            variable.lowBound, variable.upBound = (round(value), round(value)) if fixed else (0, 1)
            free += not fixed
        return free

    def _call(self, integer: bool, limit: float = math.inf, start: bool = False) -> Status:
        """Runs the solver on the program as it stands."""
        import pulp

        solver = open_solver(self.solver, min(self.left(), limit), self.gap / 2 if integer else None, start)
        try:
            status = self.program.model.solve(solver)
        except (pulp.PulpSolverError, OSError) as error:
            raise SolverError(f"solver {self.solver!r} failed: {error}") from error
        if status == pulp.LpStatusInfeasible:
            return Status.INFEASIBLE
        if self.program.model.sol_status == pulp.LpSolutionOptimal:
            return Status.OPTIMAL
        if self.program.model.sol_status == pulp.LpSolutionIntegerFeasible:
            return Status.FEASIBLE
        raise SolverError(
            f"solver {self.solver!r} found nothing in time ({pulp.LpStatus[status]}); give it a longer time_limit"
        )


def _whole(value: float) -> bool:
    return abs(value - round(value)) <= NEAR
