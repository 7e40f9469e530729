"""A placement problem made small: sizes in units, time in sections, independent parts.

Three exact reductions. Sizes are divided by their greatest common divisor: some best placement has only offsets that
are sums of sizes. Time shrinks to *sections*, the maximal sets of buffers alive at once: two buffers meet if and only
if they share a section, and a buffer's sections are consecutive (lifetimes form an interval graph). Parts are cut at
moments that no lifetime spans; they cannot disturb one another and may use the same addresses.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from memopt.planner.placement.problem import Buffer


@dataclass(frozen=True)
class Part:
    """One independent part, in units and sections; its buffers are sorted by window, size and index.

    ``index[i]`` is the position of buffer i among the buffers given to :func:`reduce`; it is alive in the sections
    ``[low[i], high[i])``. Cost: the neighbour lists hold one integer per ordered pair of buffers that meet.
    """

    index: tuple[int, ...]
    low: tuple[int, ...]
    high: tuple[int, ...]
    size: tuple[int, ...]
    sections: int

    def __len__(self) -> int:
        return len(self.index)

    @cached_property
    def max_live(self) -> int:
        """The fullest section, in units: a lower bound on the peak."""
        return max(self.loads, default=0)

    @cached_property
    def loads(self) -> tuple[int, ...]:
        """Units alive in each section."""
        change = [0] * (self.sections + 1)
        for low, high, size in zip(self.low, self.high, self.size, strict=True):
            change[low] += size
            change[high] -= size
        loads, live = [], 0
        for step in change[:-1]:
            live += step
            loads.append(live)
        return tuple(loads)

    @cached_property
    def neighbours(self) -> tuple[tuple[int, ...], ...]:
        """For each buffer the others that meet it, ascending."""
        members: list[list[int]] = [[] for _ in range(self.sections)]
        for i, (low, high) in enumerate(zip(self.low, self.high, strict=True)):
            for section in range(low, high):
                members[section].append(i)
        found = []
        for i, (low, high) in enumerate(zip(self.low, self.high, strict=True)):
            near = set().union(*members[low:high])
            near.discard(i)
            found.append(tuple(sorted(near)))
        return tuple(found)

    @cached_property
    def twins(self) -> tuple[int, ...]:
        """For each buffer the first one with the same window and size: such buffers are interchangeable."""
        first: dict[tuple[int, int, int], int] = {}
        keys = zip(self.low, self.high, self.size, strict=True)
        return tuple(first.setdefault(key, i) for i, key in enumerate(keys))


@dataclass(frozen=True)
class Instance:
    """The parts of a problem, the bytes of one unit, and how many buffers (zero-sized ones too) it has."""

    parts: tuple[Part, ...]
    unit: int
    count: int

    @property
    def max_live(self) -> int:
        """In units."""
        return max((part.max_live for part in self.parts), default=0)

    def offsets_bytes(self, solved: Sequence[Sequence[int]]) -> tuple[int, ...]:
        """One list of unit offsets per part, as bytes in the order of the given buffers; the rest lie at 0."""
        offsets = [0] * self.count
        for part, units in zip(self.parts, solved, strict=True):
            for index, offset in zip(part.index, units, strict=True):
                offsets[index] = offset * self.unit
        return tuple(offsets)


def reduce(buffers: Sequence[Buffer], alignment: int = 1) -> Instance:
    """The smaller equivalent problem; every size is first rounded up to a multiple of ``alignment`` bytes."""
    sizes = [-(-b.size // alignment) * alignment for b in buffers]
    unit = math.gcd(*sizes) or alignment
    real = sorted((b.start, b.stop, sizes[i] // unit, i) for i, b in enumerate(buffers) if sizes[i])
    groups: list[list[tuple[int, int, int, int]]] = []
    end = 0
    for entry in real:
        if not groups or entry[0] >= end:
            groups.append([])
            end = entry[1]
        groups[-1].append(entry)
        end = max(end, entry[1])
    return Instance(tuple(_part(group) for group in groups), unit, len(buffers))


def _part(entries: list[tuple[int, int, int, int]]) -> Part:
    # At one moment stops (0) come before starts (1); a set is maximal when a start is followed by a stop.
    events = sorted([(start, 1) for start, *_ in entries] + [(stop, 0) for _, stop, *_ in entries])
    begins = [now[0] for now, after in pairwise(events) if now[1] == 1 and after[1] == 0]
    rows = sorted(
        (bisect_left(begins, start), bisect_left(begins, stop), size, index) for start, stop, size, index in entries
    )
    low, high, size, index = (tuple(column) for column in zip(*rows, strict=True))
    return Part(index, low, high, size, len(begins))
