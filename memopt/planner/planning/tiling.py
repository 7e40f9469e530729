"""``plan_in_tiles``: tiles where nothing fits without them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from memopt.planner.devices import HardwareLike
from memopt.planner.plan_file import Plan
from memopt.planner.planning.answering import weight_bytes
from memopt.planner.planning.deciding import DEFAULT_ACTIONS, plan
from memopt.planner.tracing import TraceError
from memopt.planner.values import Action, Status, Trace

AUTOMATIC = (1, 8)


def plan_in_tiles(
    make_trace: Callable[[int], Trace],
    budget: int | str | None = None,
    hardware: HardwareLike = "auto",
    *,
    tiles: Sequence[int] = AUTOMATIC,
    actions: Iterable[Action | str] = DEFAULT_ACTIONS,
    time_limit: float = 10.0,
) -> tuple[Trace, Plan]:
    """Plan a step with the first number of tiles with which it fits.

    Few tiles cost less than many, and without any the step's results stay bitwise those of the plain run.

    Args:
        make_trace: from a number of tiles to the trace of the step in which token-wise parts run in so many, as
            ``memopt.trace(..., tiles=n)`` makes it.
        budget, hardware, actions, time_limit: as for ``plan``.
        tiles: the numbers tried, in this order.

    Returns:
        The trace and its plan; where nothing fits, those with the smallest budget that would.
    """
    allowed = list(actions)
    best: tuple[Trace, Plan] | None = None
    for number in tiles:
        try:
            made = make_trace(number)
        except TraceError:
            if best is None:
                raise
            break  # what runs whole need not run in tiles
        if best is not None and not made.tiles:
            break
        found = plan(made, budget, hardware, actions=allowed, time_limit=time_limit)
        if found.status is not Status.INFEASIBLE:
            return made, found
        if best is None or found.peak_bytes < best[1].peak_bytes:
            best = made, found
        if found.budget_bytes is not None and found.budget_bytes < weight_bytes(made):
            break
    if best is None:
        raise ValueError("tiles names no number to try; 1 is the step as it is")
    return best
