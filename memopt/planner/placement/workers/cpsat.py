"""CP-SAT on one placement problem: JSON on standard input, JSON on standard output.

A script that imports only ortools, run by ``methods/cpsat.py`` in its own process: ortools and highspy each bring the
HiGHS library, and importing both ends in an undefined symbol. Model, with A_i the offsets and H the arena:

    min H  subject to  A_i + S_i <= H,  H >= max-live,
    no overlap of the rectangles [low_i, high_i) x [A_i, A_i + S_i),  and of the A_i + [0, S_i) in every section
"""

from __future__ import annotations

import json
import sys
from typing import Any


def solve(problem: dict[str, Any]) -> dict[str, Any]:
    """Offsets where some were found, and the proven lower bound on H.

    ``problem``: ``low``, ``high``, ``size`` by buffer, ``capacity`` (H's largest value), ``lower`` (its smallest),
    ``hint`` offsets, ``minimise``, ``seconds``, ``seed``, ``workers``.
    """
    from ortools.sat.python import cp_model

    model = cp_model.CpModel()
    arena = model.new_int_var(problem["lower"], problem["capacity"], "arena")
    offsets, across, upward = [], [], []
    members: dict[int, list[Any]] = {}
    for i, (low, high, size) in enumerate(zip(problem["low"], problem["high"], problem["size"], strict=True)):
        offset = model.new_int_var(0, problem["capacity"] - size, f"offset{i}")
        rise = model.new_fixed_size_interval_var(offset, size, f"up{i}")
        offsets.append(offset)
        upward.append(rise)
        across.append(model.new_fixed_size_interval_var(low, high - low, f"across{i}"))
        model.add(offset + size <= arena)
        model.add_hint(offset, min(problem["hint"][i], problem["capacity"] - size))
        for section in range(low, high):
            members.setdefault(section, []).append(rise)
    model.add_no_overlap_2d(across, upward)
    for intervals in members.values():
        model.add_no_overlap(intervals)
    if problem["minimise"]:
        model.minimize(arena)
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = problem["seconds"]
    solver.parameters.num_workers = problem["workers"]
    solver.parameters.random_seed = problem["seed"] % (1 << 31)
    status = solver.solve(model)
    found = status in (cp_model.OPTIMAL, cp_model.FEASIBLE)
    lower = problem["lower"]
    if status == cp_model.INFEASIBLE:
        lower = problem["capacity"] + 1
    elif status == cp_model.OPTIMAL and problem["minimise"]:
        lower = solver.value(arena)
    return {"offsets": [solver.value(offset) for offset in offsets] if found else [], "lower": lower}


if __name__ == "__main__":
    json.dump(solve(json.load(sys.stdin)), sys.stdout)
