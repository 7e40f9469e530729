"""The solvers that PuLP can run, by a short name or by PuLP's own."""

from __future__ import annotations

import warnings
from math import inf
from typing import Any

NAMES = {"cbc": "PULP_CBC_CMD", "highs": "HiGHS", "gurobi": "GUROBI_CMD", "scip": "SCIP_CMD"}


LONGEST_SECONDS = 86400.0  # CBC takes an infinite limit for none at all, and some solvers refuse very large ones


def check_time_limit(time_limit: float) -> float:
    """Refuse what is no limit.

    Raises:
        ValueError: not a positive, finite number of seconds.
    """
    if isinstance(time_limit, bool) or not isinstance(time_limit, (int, float)) or not 0 < time_limit < inf:
        raise ValueError(f"time_limit must be a positive, finite number of seconds, not {time_limit!r}")
    return float(time_limit)


class SolverError(RuntimeError):
    """The solver is missing, crashed, or answered nonsense; the message says which and what to do."""


def open_solver(name: str, time_limit: float, gap: float | None, start: bool = False) -> Any:
    """A PuLP solver object that can be run here.

    Args:
        name: "cbc" (bundled with PuLP), "highs", "gurobi", "scip", or PuLP's name of another.
        time_limit: seconds.
        gap: absolute gap at which an integer answer counts as best; None for a continuous program.
        start: whether the variables' values are an answer to begin with, where the solver can use one.

    Raises:
        SolverError: unknown, or not installed.
    """
    import pulp

    limits: dict[str, Any] = {"timeLimit": min(max(1.0, time_limit), LONGEST_SECONDS)}
    if gap is not None:
        limits["gapAbs"] = gap
    if start and name == "cbc":
        limits["warmStart"] = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # PuLP 3 about 4: the bundled solver is what we want
            solver = pulp.getSolver(NAMES.get(name, name), msg=False, **limits)
            available = solver.available()
    except pulp.PulpSolverError as error:
        raise SolverError(f"solver {name!r} is not known to PuLP; choose {', '.join(NAMES)}") from error
    if not available:
        remedy = "pip install --force-reinstall pulp" if name == "cbc" else "install it, or take solver='cbc'"
        raise SolverError(f"solver {name!r} cannot be run here: {remedy}")
    return solver
