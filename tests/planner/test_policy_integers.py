"""The search for integers on a program so small that every answer is known: what it may claim, and what it keeps."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import product
from types import SimpleNamespace
from typing import Any

import pulp
import pytest

from memopt.planner.policy import integers
from memopt.planner.policy.integers import IntegerSearch
from memopt.planner.policy.program import Program
from memopt.planner.values import Status

GAP = 1e-3
VALUES, SIZES, ROOM = (60, 45, 45), (6, 5, 5), 10
BEST = min(
    sum(value for value, kept in zip(VALUES, keep, strict=True) if not kept)
    for keep in product((False, True), repeat=3)
    if sum(size for size, kept in zip(SIZES, keep, strict=True) if kept) <= ROOM
)


def search() -> IntegerSearch:
    """Three items of which not all can be kept; what is dropped costs its value.

    Relaxed, the first is kept and so are four fifths of the second. So fixed, the second has to go as well, at a cost
    of 90; best is to keep the other two, at 60.
    """
    items = [SimpleNamespace(choices=[SimpleNamespace(variable=2 * n + c) for c in (0, 1)]) for n in range(3)]
    problem: Any = SimpleNamespace(blocks=[SimpleNamespace(items=items)])
    program = Program(problem, pulp.LpProblem("three", pulp.LpMinimize), 1.0, 1.0)
    program.choices = {n: program.continuous(f"x{n}", 0, 1) for n in range(6)}
    keep, drop = ([program.choices[2 * n + c] for n in range(3)] for c in (0, 1))
    for n in range(3):
        program.add(keep[n] + drop[n] == 1)
    program.add(program.total(zip(keep, SIZES, strict=True)) <= ROOM)
    program.model.setObjective(program.total(zip(drop, VALUES, strict=True)))
    return IntegerSearch(program, frozenset(), "cbc", GAP, deadline=time.monotonic() + 60)


def answer(found: IntegerSearch) -> list[float | None]:
    return [variable.varValue for variable in found.program.choices.values()]


def test_once_all_that_could_improve_are_free_the_answer_is_proven() -> None:
    found = search()
    status, method = found.minimise()
    assert status is Status.OPTIMAL
    assert found.objective() == BEST == 60
    assert BEST - GAP <= found.bound <= BEST
    assert "over the 6 undecided of 6 choices" in method


def test_an_answer_over_a_part_of_what_could_improve_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the first item fixed the solver calls 90 the optimum, and so it is, of what is left."""
    monkeypatch.setattr(integers, "FREE_LIMITS", (1,))
    found = search()
    found.minimise()
    assert found.objective() == 90
    assert found.bound <= BEST


def fails(lp: Any) -> int:
    raise pulp.PulpSolverError("broke down")


def gives_up(lp: Any) -> int:
    lp.assignStatus(pulp.LpStatusInfeasible, pulp.LpSolutionInfeasible)
    return int(pulp.LpStatusInfeasible)


def answers_worse(lp: Any) -> int:
    """Everything dropped, as a solver may that does not begin with the answer at hand."""
    for variable in lp.variables():
        variable.varValue = float(int(variable.name[1:]) % 2)
    lp.assignStatus(pulp.LpStatusOptimal, pulp.LpSolutionIntegerFeasible)
    return int(pulp.LpStatusOptimal)


@pytest.mark.parametrize("attempt", [fails, gives_up, answers_worse])
@pytest.mark.parametrize("limits", [(150,), (150, 400)])
def test_an_attempt_that_leads_nowhere_costs_nothing(
    attempt: Callable[[Any], int], limits: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it left in the variables, the answer is the one before; a further attempt finds what there is."""
    monkeypatch.setattr(integers, "FREE_LIMITS", limits)
    solve, calls = pulp.PULP_CBC_CMD.actualSolve, []

    def third(self: Any, lp: Any, **options: Any) -> int:
        calls.append(answer(found))
        if len(calls) != 3:
            return int(solve(self, lp, **options))
        for variable in lp.variables():
            variable.varValue = None
        return attempt(lp)

    monkeypatch.setattr(pulp.PULP_CBC_CMD, "actualSolve", third)
    found = search()
    status, _ = found.minimise()
    assert status is Status.OPTIMAL
    if len(limits) == 1:
        assert answer(found) == calls[2] == [1, 0, 0, 1, 0, 1]
        assert found.objective() == 90
        assert found.bound <= BEST
    else:
        assert calls[3] == calls[2]  # it began where the first integers were
        assert answer(found) == [0, 1, 1, 0, 1, 0]
        assert found.objective() == BEST
