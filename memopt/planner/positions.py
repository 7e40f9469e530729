"""The positions of a step at which memory must fit, reduced to those that can matter.

Between two moments at which any choice gains or loses bytes only the fixed profile changes, so its maximum stands for
all operations between. A position is left out when even the largest choices fit there, or when another position with
the same quiet blocks holds at least as much under every choice: p is covered by q iff
fixed_p - fixed_q + sum over items of max over choices (p - q) + sum over resources of max(0, p - q) <= 0.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from memopt.planner.problem import BlockItems, Item, Position, held_at
from memopt.planner.values import Action, Storage, Trace

Terms = dict[int, int]
Layout = list[list[int]]


def fixed_profile(trace: Trace, managed: set[int]) -> npt.NDArray[np.int64]:
    """Resident bytes at every operation of the storages that no plan governs."""
    change = np.zeros(len(trace.ops) + 1, dtype=np.int64)
    for storage in trace.storages:
        if storage.id not in managed:
            start, stop = _clip(storage, len(trace.ops))
            change[start] += storage.bytes
            change[stop] -= storage.bytes
    return np.cumsum(change)[:-1]


def _clip(storage: Storage, length: int) -> tuple[int, int]:
    return min(max(storage.birth, 0), length), min(max(storage.death, 0), length)


def positions(
    trace: Trace, blocks: tuple[BlockItems, ...], managed: set[int], budget_bytes: int | None
) -> tuple[Position, ...]:
    """Find the positions that a policy must check; none where there is no budget."""
    if budget_bytes is None or not trace.ops:
        return ()
    fixed = fixed_profile(trace, managed)
    edges = sorted({0, *(edge for block in blocks for edge in _edges(block) if 0 <= edge < len(fixed))})
    extents = [(min(_edges(block)), max(_edges(block))) for block in blocks]
    groups: defaultdict[tuple[int, int], list[tuple[int, int, Terms]]] = defaultdict(list)
    for start, stop in zip(edges, [*edges[1:], len(fixed)], strict=True):
        time = start + int(np.argmax(fixed[start:stop]))
        quiet, busy = _states(blocks, extents, start)
        groups[quiet].append((time, int(fixed[time]), _terms((blocks[b] for b in busy), start)))
    births: defaultdict[int, int] = defaultdict(int)
    for storage in trace.storages:
        if storage.id not in managed:
            births[storage.birth] += storage.bytes
    for block in blocks:
        for item in block.items:
            time = item.first_need
            if item.replay_bytes and 0 <= time < len(fixed):
                quiet, busy = _states(blocks, extents, time)
                terms = _terms((blocks[b] for b in busy), time)
                before = int(fixed[time]) - births[time]
                groups[quiet] += [(time, before, again) for again in _while_replaying(item, terms)]
    largest = [sum(max(c.held_bytes for c in item.choices) for item in block.items) for block in blocks]
    layout = [
        [[c.variable for c in item.choices] for item in block.items] + [[r.variable] for r in block.resources]
        for block in blocks
    ]
    owner = {variable: b for b, items in enumerate(layout) for variables in items for variable in variables}
    found: list[Position] = []
    for quiet, members in groups.items():
        room = budget_bytes - sum(largest[quiet[0] : quiet[1]])
        for time, bytes, terms in _uncovered(members, layout, owner, room):
            found.append(Position(time, trace.ops[time].name, bytes, quiet, tuple(sorted(terms.items()))))
    return tuple(sorted(found, key=lambda position: (position.time, position.terms)))


def _edges(block: BlockItems) -> Iterable[int]:
    yield from block.quiet
    yield from (edge for item in block.items for c in item.choices for span in c.spans for edge in span[:2])
    yield from (edge for resource in block.resources for span in resource.spans for edge in span[:2])


def _states(
    blocks: tuple[BlockItems, ...], extents: list[tuple[int, int]], time: int
) -> tuple[tuple[int, int], list[int]]:
    """The longest run of quiet blocks, and the other blocks that may hold anything."""
    quiet = [b for b, block in enumerate(blocks) if block.quiet[0] <= time < block.quiet[1]]
    best, start = (0, 0), 0
    for n, b in enumerate(quiet):
        if n and b != quiet[n - 1] + 1:
            start = n
        if n - start + 1 > best[1] - best[0]:
            best = (quiet[start], b + 1)
    within = (b for b, (first, last) in enumerate(extents) if first <= time < last)
    return best, [b for b in within if not best[0] <= b < best[1]]


def _terms(blocks: Iterable[BlockItems], time: int) -> Terms:
    """What each variable of these blocks would hold at an operation."""
    terms: Terms = {}
    for block in blocks:
        for item in block.items:
            for choice in item.choices:
                if held := held_at(choice.spans, time):
                    terms[choice.variable] = held
        for resource in block.resources:
            if held := held_at(resource.spans, time):
                terms[resource.variable] = held
    return terms


def _while_replaying(item: Item, base: Terms) -> Iterable[Terms]:
    """An item's replay, just before the operation that needs it: values that are not saved are there as well."""
    for choice in item.choices:
        if choice.action is Action.RECOMPUTE:
            yield {**base, choice.variable: base.get(choice.variable, 0) + item.replay_bytes}


def _uncovered(
    members: list[tuple[int, int, Terms]], layout: list[Layout], owner: dict[int, int], room: int
) -> list[tuple[int, int, Terms]]:
    """The members that can exceed the room and that no other member covers, least choices moved into the fixed part."""
    busy = sorted({owner[v] for _, _, terms in members for v in terms})
    items = [variables for b in busy for variables in layout[b]]
    flat = [v for variables in items for v in variables]
    if not flat:
        return [max(members, key=lambda m: m[1])] if max(m[1] for m in members) > room else []
    starts = np.cumsum([0, *(len(variables) for variables in items)])[:-1]
    single = np.array([len(variables) == 1 for variables in items])
    held = np.array([[terms.get(v, 0) for v in flat] for _, _, terms in members], dtype=np.int64)
    fixed = np.array([m[1] for m in members], dtype=np.int64)
    most = fixed + np.maximum.reduceat(held, starts, axis=1).sum(axis=1)
    alive = [int(n) for n in np.argsort(-most, kind="stable") if most[n] > room]
    chosen: list[int] = []
    for n in alive:
        if chosen:
            over = np.maximum.reduceat(held[n] - held[chosen], starts, axis=1)
            over[:, single] = np.maximum(over[:, single], 0)
            if (fixed[n] - fixed[chosen] + over.sum(axis=1) <= 0).any():
                continue
        chosen.append(n)
    least = np.minimum.reduceat(held, starts, axis=1)
    least[:, single] = 0
    lengths = [len(variables) for variables in items]
    rest = held - np.repeat(least, lengths, axis=1)
    total = fixed + least.sum(axis=1)
    return [
        (members[n][0], int(total[n]), {v: int(x) for v, x in zip(flat, rest[n], strict=True) if x}) for n in chosen
    ]
