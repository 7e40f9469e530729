"""The positions of a step at which memory must fit, reduced to those that can matter.

Between two moments at which any choice gains or loses bytes only the fixed profile changes, so its maximum stands for
all operations between. A position is left out when even its largest choices are below what some position holds under
the least ones, or when another position with the same quiet blocks holds at least as much under every choice: p is
covered by q iff
fixed_p - fixed_q + sum over items of max over choices (p - q) + sum over resources of max(0, p - q) <= 0.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from memopt.planner.problem.statement import BlockItems, Position
from memopt.planner.values import Action, Storage, Trace

Ints = npt.NDArray[np.int64]


@dataclass
class _Group:
    """Moments with the same quiet blocks: time, fixed bytes, and a (variable, bytes) that only this moment holds."""

    times: list[int] = field(default_factory=list)
    fixed: list[int] = field(default_factory=list)
    extra: list[tuple[int, int] | None] = field(default_factory=list)
    busy: set[int] = field(default_factory=set)

    def add(self, time: int, fixed: int, busy: set[int], extra: tuple[int, int] | None = None) -> None:
        self.times.append(time)
        self.fixed.append(fixed)
        self.extra.append(extra)
        self.busy |= busy


@dataclass(frozen=True)
class _Columns:
    """The variables of some blocks: one column each, items first to last, each resource an item of its own."""

    variables: list[int]
    starts: Ints
    lengths: Ints
    optional: npt.NDArray[np.bool_]
    span_start: Ints
    span_stop: Ints
    span_bytes: Ints
    span_column: Ints

    def held(self, group: _Group) -> Ints:
        """What each variable holds at each moment of a group."""
        times = np.array(group.times, dtype=np.int64)[:, None]
        there = (self.span_start <= times) & (times < self.span_stop)
        table = np.zeros((len(group.times), len(self.variables)), dtype=np.int64)
        np.add.at(table.T, self.span_column, (there * self.span_bytes).T)
        column = {variable: n for n, variable in enumerate(self.variables)}
        for row, extra in enumerate(group.extra):
            if extra is not None:
                table[row, column[extra[0]]] += extra[1]
        return table

    def most(self, table: Ints) -> Ints:
        """The largest choices' total."""
        return np.asarray(np.maximum.reduceat(table, self.starts, axis=1).sum(axis=1))

    def least(self, table: Ints) -> Ints:
        """What is held whatever is chosen, item by item."""
        found: Ints = np.minimum.reduceat(table, self.starts, axis=1)
        found[:, self.optional] = 0
        return found


def positions(trace: Trace, blocks: tuple[BlockItems, ...], managed: set[int]) -> tuple[Position, ...]:
    """Find the positions that a policy must check under some budget."""
    if not trace.ops:
        return ()
    groups = _grouped(trace, blocks, managed)
    largest = [
        sum(max(c.held_bytes for c in item.choices) for item in block.items)
        + sum(r.held_bytes for r in block.resources)
        for block in blocks
    ]
    smallest = [sum(min(c.held_bytes for c in item.choices) for item in block.items) for block in blocks]
    tables, floor = [], 0
    for quiet, group in groups.items():
        columns = _columns([blocks[b] for b in sorted(group.busy)])
        fixed = np.array(group.fixed, dtype=np.int64)
        held = columns.held(group) if columns.variables else np.zeros((len(fixed), 0), dtype=np.int64)
        most, least = fixed + sum(largest[slice(*quiet)]), fixed + sum(smallest[slice(*quiet)])
        if columns.variables:
            most, least = most + columns.most(held), least + columns.least(held).sum(axis=1)
        floor = max(floor, int(least.max()))
        tables.append((quiet, group, columns, fixed, held, most))
    found: list[Position] = []
    for quiet, group, columns, fixed, held, most in tables:
        for row in _uncovered(columns, fixed, held, most, floor):
            total, terms = int(fixed[row]), {}
            if columns.variables:
                least = columns.least(held[row : row + 1])
                total += int(least.sum())
                rest = held[row] - np.repeat(least[0], columns.lengths)
                terms = {columns.variables[n]: int(rest[n]) for n in np.flatnonzero(rest)}
            time = group.times[row]
            name = trace.ops[time].name
            found.append(Position(time, name, total, quiet, tuple(sorted(terms.items())), int(most[row])))
    return tuple(sorted(found, key=lambda position: (position.time, position.terms)))


def _grouped(trace: Trace, blocks: tuple[BlockItems, ...], managed: set[int]) -> dict[tuple[int, int], _Group]:
    """Every moment that is worth a look, by its quiet blocks."""
    fixed = fixed_profile(trace, managed)
    edges = sorted({0, *(edge for block in blocks for edge in _edges(block) if 0 <= edge < len(fixed))})
    spans = np.array([(*block.quiet, min(_edges(block)), max(_edges(block))) for block in blocks], dtype=np.int64)
    groups: defaultdict[tuple[int, int], _Group] = defaultdict(_Group)
    for start, stop in zip(edges, [*edges[1:], len(fixed)], strict=True):
        time = start + int(np.argmax(fixed[start:stop]))
        quiet, busy = _states(spans, start)
        groups[quiet].add(time, int(fixed[time]), busy)
    births: defaultdict[int, int] = defaultdict(int)
    for storage in trace.storages:
        if storage.id not in managed:
            births[storage.birth] += storage.bytes
    for block in blocks:
        for item in block.items:
            time = item.first_need
            for choice in item.choices:
                if choice.action is Action.RECOMPUTE and item.replay_bytes and 0 <= time < len(fixed):
                    # Just before the operation that needs it: its outputs are not there yet, the replay's values are.
                    quiet, busy = _states(spans, time)
                    before = int(fixed[time]) - births[time]
                    groups[quiet].add(time, before, busy, (choice.variable, item.replay_bytes))
    return groups


def fixed_profile(trace: Trace, managed: set[int]) -> Ints:
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


def _edges(block: BlockItems) -> Iterator[int]:
    yield from block.quiet
    yield from (edge for item in block.items for c in item.choices for span in c.spans for edge in span[:2])
    yield from (edge for resource in block.resources for span in resource.spans for edge in span[:2])


def _states(spans: Ints, time: int) -> tuple[tuple[int, int], set[int]]:
    """The longest run of quiet blocks, and the other blocks that may hold anything."""
    if not len(spans):
        return (0, 0), set()
    quiet = np.flatnonzero((spans[:, 0] <= time) & (time < spans[:, 1]))
    best = (0, 0)
    for run in np.split(quiet, np.flatnonzero(np.diff(quiet) != 1) + 1):
        if len(run) > best[1] - best[0]:
            best = (int(run[0]), int(run[-1]) + 1)
    within = np.flatnonzero((spans[:, 2] <= time) & (time < spans[:, 3]))
    return best, {int(b) for b in within if not best[0] <= b < best[1]}


def _columns(blocks: list[BlockItems]) -> _Columns:
    items = [[(c.variable, c.spans) for c in item.choices] for block in blocks for item in block.items]
    single = [[(r.variable, r.spans)] for block in blocks for r in block.resources]
    flat = [pair for item in (*items, *single) for pair in item]
    lengths = np.array([len(item) for item in (*items, *single)], dtype=np.int64)
    rows = [(start, stop, size, n) for n, (_, spans) in enumerate(flat) for start, stop, size in spans]
    table = np.array(rows, dtype=np.int64).reshape(-1, 4)
    return _Columns(
        variables=[variable for variable, _ in flat],
        starts=np.cumsum(np.concatenate([np.zeros(1, np.int64), lengths]))[:-1],
        lengths=lengths,
        optional=np.array([False] * len(items) + [True] * len(single), dtype=bool),
        span_start=table[:, 0],
        span_stop=table[:, 1],
        span_bytes=table[:, 2],
        span_column=table[:, 3],
    )


def _uncovered(columns: _Columns, fixed: Ints, held: Ints, most: Ints, floor: int) -> list[int]:
    """The moments that can exceed the floor and that no other covers, fullest first."""
    order = [int(n) for n in np.argsort(-most, kind="stable") if most[n] >= floor]
    if not columns.variables:
        return order[:1]
    differs = np.logical_or.reduceat((held != held[:1]).any(axis=0), columns.starts)
    if not differs.any():
        return [max(order, key=lambda n: fixed[n])] if order else []
    lengths, optional = columns.lengths[differs], columns.optional[differs]
    starts = np.cumsum(np.concatenate([np.zeros(1, np.int64), lengths]))[:-1]
    held = held[:, np.repeat(differs, columns.lengths)]
    chosen: list[int] = []
    for n in order:
        if chosen:
            over = np.maximum.reduceat(held[n] - held[chosen], starts, axis=1)
            over[:, optional] = np.maximum(over[:, optional], 0)
            if (fixed[n] - fixed[chosen] + over.sum(axis=1) <= 0).any():
                continue
        chosen.append(n)
    return chosen
