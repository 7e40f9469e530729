"""What comes back before backward asks for it, because a replay reads it.

A recomputed storage r is replayed at its first need. Its replay reads s; where s was recomputed too, or swapped without
overlap, s comes back then and stays. Where s is read not by r's own replay but by that of i, which r's reads, the same
holds when i is recomputed as well. (Longer chains count as if all between were recomputed: an upper bound.)
"""

from __future__ import annotations

from collections.abc import Callable

from memopt.planner.problem.statement import Item, Resource, Together
from memopt.planner.values import Action

SMALL_SHARE = 0.01  # of a block's saved bytes: what is smaller is not worth a variable


def early_returns(
    items: list[Item], number: Callable[[], int], overlap: bool
) -> tuple[list[Resource], tuple[Together, ...]]:
    """Resources for the bytes of early returns, and when each is taken.

    Between the needs of two readers there is one resource for each storage; it is taken when the pair of a reader at or
    before its beginning and the storage calls for it. ``number`` gives the next variable.
    """
    limit = SMALL_SHARE * sum(item.bytes for item in items)
    by_index = {item.index: item for item in items}
    resources: list[Resource] = []
    together: list[Together] = []
    for item in items:
        away = _variables(item, {Action.RECOMPUTE} if overlap else {Action.RECOMPUTE, Action.SWAP})
        reached = _readers(item, by_index)
        times = sorted({by_index[r].first_need for r, _ in reached if by_index[r].first_need < item.first_need})
        if not away or item.bytes <= limit or not times:
            continue
        before = None
        for start, stop in zip(times, [*times[1:], item.first_need], strict=True):
            resource = Resource(number(), 0.0, ((start, stop, item.bytes),))
            resources.append(resource)
            pairs = [(r, via) for r, via in reached if by_index[r].first_need == start]
            for r, via in pairs:
                groups = [away] + [_variables(by_index[x], {Action.RECOMPUTE}) for x in dict.fromkeys((via, r))]
                if all(groups):
                    together.append(Together(resource.variable, tuple(groups), None))
            if before is not None:
                together.append(Together(resource.variable, (), before))
            before = resource.variable
    return resources, tuple(together)


def _variables(item: Item, actions: set[Action]) -> tuple[int, ...]:
    return tuple(choice.variable for choice in item.choices if choice.action in actions)


def _readers(item: Item, items: dict[int, Item]) -> list[tuple[int, int]]:
    """All (r, i): the replay of i reads the item, and i is r or is read on the way from r."""
    found: list[tuple[int, int]] = []
    for via in item.readers:
        if via not in items:
            continue
        todo, seen = [via], {via}
        while todo:
            reader = todo.pop()
            found.append((reader, via))
            for further in items[reader].readers:
                if further in items and further not in seen:
                    seen.add(further)
                    todo.append(further)
    return found
