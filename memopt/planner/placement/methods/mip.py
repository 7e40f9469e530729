"""MEMO's mixed-integer program, made safe, through PuLP with its bundled CBC.

    min M  subject to  A_i + S_i <= M,  and for each pair (i, j) alive at once, z_ij in {0, 1}:
    A_i + S_i <= A_j + U z_ij,   A_j + S_j <= A_i + U (1 - z_ij)

Source: MEMO (arXiv 2407.12117), section 4.2, the flat form. Differences: U is the best peak known instead of the
device's memory, so that the solver's tolerance is a small number of bytes; M >= max-live, without which the relaxation
is worthless; equal buffers are ordered; the answer is only taken for its order, by the driver's check and repair (taken
verbatim, solvers return overlapping buffers inside the tolerance of U z_ij); a bound counts only where U is small
enough for the tolerance to stay below one unit.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

from memopt.planner.placement.task import Method, Task
from memopt.planner.policy.solvers import SolverError, open_solver

_LARGEST_PAIRS = 20_000
_EXACT_BELOW = 200_000  # units; CBC's integrality tolerance of 1e-6 times this stays below one
_SHORTEST = 0.5


def run(task: Task) -> None:
    """One solve, from no start but bounded by the best peak; proves optimality on small problems."""
    import pulp

    part = task.part
    pairs = [(i, j) for i, near in enumerate(part.neighbours) for j in near if i < j]
    if len(pairs) > _LARGEST_PAIRS or task.seconds_left() < _SHORTEST:
        return
    largest = task.peak if task.minimise else task.goal
    problem = pulp.LpProblem("placement", pulp.LpMinimize)
    arena = _variable(problem, "arena", task.lower, largest)
    problem += arena
    offsets = [_variable(problem, f"offset{i}", 0, largest - size) for i, size in enumerate(part.size)]
    for offset, size in zip(offsets, part.size, strict=True):
        problem += offset + size <= arena
    for i, j in pairs:
        if part.twins[i] == part.twins[j]:
            problem += offsets[i] + part.size[i] <= offsets[j]
            continue
        below = _variable(problem, f"below{i}_{j}", 0, 1, pulp.LpInteger)
        problem += offsets[i] + part.size[i] <= offsets[j] + largest * below
        problem += offsets[j] + part.size[j] <= offsets[i] + largest * (1 - below)
    try:
        problem.solve(open_solver("cbc", task.seconds_left(), gap=0.5))
    except (pulp.PulpSolverError, SolverError, OSError) as error:
        task.remarks.append(f"CBC gave no answer ({error})")
        return
    exact = largest < _EXACT_BELOW
    if problem.status == pulp.LpStatusInfeasible and exact:
        task.prove(largest + 1, "the mixed-integer program has no solution")
    if problem.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return
    if problem.sol_status == pulp.LpSolutionOptimal and exact:
        task.prove(math.ceil(arena.value() - 0.5), "the mixed-integer program is solved")
    task.offer([round(offset.value()) for offset in offsets], "MIP")


def _variable(problem: Any, name: str, low: int, high: int, kind: str = "Continuous") -> Any:
    if hasattr(problem, "add_variable"):
        return problem.add_variable(name, low, high, kind)
    import pulp  # before 3.3 variables were made on their own

    return pulp.LpVariable(name, low, high, kind)


def missing() -> str | None:
    """The package that this method needs and this machine lacks."""
    return None if importlib.util.find_spec("pulp") else "pulp"


METHOD = Method("mip", rank=3, run=run, missing=missing, stands_in_for="cpsat")
