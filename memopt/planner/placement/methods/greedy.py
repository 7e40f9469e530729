"""Greedy orders, the most promising first; the driver itself has already tried the largest first, best fit."""

from __future__ import annotations

from collections.abc import Callable

from memopt.planner.placement.instance import Part
from memopt.planner.placement.ordering import place_in_order
from memopt.planner.placement.task import Method, Task


def _width(part: Part, b: int) -> int:
    return part.high[b] - part.low[b]


def _fullest(part: Part, b: int) -> int:
    return max(part.loads[part.low[b] : part.high[b]])


# Each key sorts ascending. The names tell what comes first.
_ORDERS: dict[str, tuple[bool, Callable[[Part, int], tuple[int, ...]]]] = {
    "largest": (False, lambda part, b: (-part.size[b], -_width(part, b))),
    "largest area": (False, lambda part, b: (-part.size[b] * _width(part, b),)),
    "longest": (False, lambda part, b: (-_width(part, b), -part.size[b])),
    "longest, best fit": (True, lambda part, b: (-_width(part, b), -part.size[b])),
    "first to start": (False, lambda part, b: (part.low[b], -part.size[b])),
    "last to stop": (False, lambda part, b: (-part.high[b], -part.size[b])),
    "most crowded": (False, lambda part, b: (-_fullest(part, b), -part.size[b])),
}


def run(task: Task) -> None:
    """Tries the orders one after another until one is good enough. Deterministic."""
    part = task.part
    for name, (best_fit, key) in _ORDERS.items():
        if task.done or not task.seconds_left():
            return
        order = sorted(range(len(part)), key=lambda b: (*key(part, b), b))
        task.offer(place_in_order(part, order, best_fit=best_fit), f"greedy ({name})")


METHOD = Method("greedy", rank=0, run=run)
