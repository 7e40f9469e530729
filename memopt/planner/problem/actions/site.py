"""Where an action may be applied: one saved storage, its moments and what recomputing it takes."""

from __future__ import annotations

from dataclasses import dataclass

from memopt.planner.devices import Rates
from memopt.planner.problem.statement import Span


@dataclass(frozen=True)
class Site:
    """One saved storage as the actions see it; times are operation indices.

    It is written from ``birth`` on, forward uses it at ``last_use`` at the latest and lets go of it at ``forward_end``,
    backward needs it from ``first_need`` to ``death``. With overlapped copies it has left by ``leave`` and starts to
    come back at ``arrive``. Forward lets go ``lead_seconds`` before the block's forward ends. ``replay_seconds`` is
    what its replay costs beside the shared ``replay_needs``; ``None`` where none is possible. ``divisible`` says that a
    share of it is worth an own choice.
    """

    bytes: int
    dtype: str
    birth: int
    last_use: int
    forward_end: int
    first_need: int
    death: int
    leave: int
    arrive: int
    lead_seconds: float
    replay_seconds: float | None
    replay_needs: tuple[int, ...]
    rates: Rates
    divisible: bool = False


def resident(bytes: int, *intervals: tuple[int, int]) -> tuple[Span, ...]:
    """Spans of one storage that is there in each of the intervals; what overlaps or touches is joined."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(pair for pair in intervals if pair[0] < pair[1]):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return tuple((start, stop, bytes) for start, stop in joined)
