"""Depth-first placement on a skyline: the plain Python reference of ``skyline.cpp``.

Buffers of one :class:`~memopt.planner.placement.instance.Part` are placed in order of offset on a *skyline*, the
height reached in every section. A buffer is *grounded* at the highest skyline of its window. Each step takes a
grounded buffer of the lowest level and branches: it lies here, or it does not. One that does not is *skipped*: out of
play until a neighbour placed under it raises it. Every best placement (smallest sum of offsets) is reached this way
exactly once, so a search that ends without a placement proves that the capacity is too small.

What cuts the tree, each sound for such placements:

* bound: in one section all buffers lie one above another; taken in order of their lowest possible offset e, the level
  c <- max(c, e) + size must stay within the capacity. A skipped buffer's e is the lowest end of an unplaced neighbour.
* dominance: a skipped buffer that could still drop beneath all its unplaced neighbours belongs to the other branch.
* groups: where no unplaced buffer spans a boundary the two sides are solved one after the other, and a failure undoes
  only decisions whose windows meet the *conflict*, the range of sections that the failure rests on.
* twins: of buffers with the same window and size, skipping one skips all.

Which grounded buffer comes first decides everything. The score favours crowded sections (little capacity left),
sections in which bounds failed before (also in earlier attempts), long windows and large sizes; it is against gaps
beneath. All arithmetic is on integers, so both implementations take the same steps and return the same offsets.
Source: research by the authors; ideas from minimalloc's canonical order and section bounds, and conflict weights as in
constraint solvers (dom/wdeg).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

from memopt.planner.placement.instance import Part

FAILED_BOUND = 64
"""What one failed bound adds to its section's count; the score uses log2(FAILED_BOUND + count)."""


class Verdict(IntEnum):
    """How an attempt ended; the values are the native function's return codes."""

    EXHAUSTED = 0
    FOUND = 1
    OUT_OF_NODES = 2
    OUT_OF_TIME = 3


class Attempt(NamedTuple):
    """``offsets`` in units, by buffer of the part; empty unless the verdict is ``FOUND``."""

    verdict: Verdict
    nodes: int
    offsets: tuple[int, ...]


@dataclass(frozen=True)
class Score:
    """Weights in 1/64: score = fixed + crowd * fullest/capacity + conflict * log2(failures) - waste * gap/capacity."""

    fixed: Sequence[int]
    crowd: int
    conflict: int
    waste: int


def log2_fixed(x: int) -> int:
    """log2 of x >= 1 in 16.16 fixed point, linear between powers of two (at most 0.09 too small)."""
    power = x.bit_length() - 1
    return (power << 16) + ((x << 16) >> power) - (1 << 16)


class _Range(NamedTuple):
    low: int
    high: int

    def meets(self, other: _Range) -> bool:
        return self.low < other.high and other.low < self.high


def _hull(ranges: Sequence[_Range]) -> _Range:
    return _Range(min(r.low for r in ranges), max(r.high for r in ranges))


@dataclass
class _Node:
    members: list[int]
    mark: int
    chosen: int = -1
    inner_mark: int = 0
    pending: list[list[int]] = field(default_factory=list)
    tried: list[tuple[_Range, _Range]] = field(default_factory=list)


def attempt(
    part: Part, capacity: int, score: Score, failures: list[int], node_limit: int, seconds: float = 1e9
) -> Attempt:
    """Searches for offsets that end within ``capacity`` units, for at most ``node_limit`` steps.

    ``failures`` (one count per section) is read by the score and added to. ``EXHAUSTED`` proves that there is none.
    Cost: O(sum of window widths) time per step, about 1 ms for 300 buffers.
    """
    return _Search(part, capacity, score, failures).run(node_limit, seconds)


class _Search:
    def __init__(self, part: Part, capacity: int, score: Score, failures: list[int]) -> None:
        self.part, self.capacity, self.score, self.failures = part, capacity, score, failures
        self.near, self.twins, self.size = part.neighbours, part.twins, part.size
        self.window = [_Range(low, high) for low, high in zip(part.low, part.high, strict=True)]
        count = len(part)
        self.skyline = [0] * part.sections
        self.level = [0] * part.sections  # what the bound reaches in each section
        self.ground = [0] * count
        self.lowest = [0] * count  # lowest possible offset, as of the last bound
        self.placed = [0] * count  # 0 or 1, as in the next
        self.skipped = [0] * count
        self.offsets = [0] * count
        self.trail: list[tuple[list[int], int, int]] = []

    def run(self, node_limit: int, seconds: float) -> Attempt:
        deadline = time.monotonic() + seconds
        stack = [_Node(list(range(len(self.part))), 0)]
        nodes = 0
        solved = False  # the group tried last has a placement
        conflict: _Range | None = None  # or it has none, for this reason
        while stack:
            node = stack[-1]
            if solved:
                if node.pending:
                    stack.append(_Node(node.pending.pop(), len(self.trail)))
                    solved = False
                else:
                    stack.pop()
                    continue
                node = stack[-1]
            elif conflict is not None:
                self.undo(node.inner_mark)
                if not conflict.meets(self.window[node.chosen]):
                    conflict = self.leave(stack, conflict)
                    continue
                node.tried.append((self.window[node.chosen], conflict))
                self.skip(node)
            nodes += 1
            if nodes > node_limit:
                return Attempt(Verdict.OUT_OF_NODES, nodes, ())
            if nodes % 32 == 0 and time.monotonic() > deadline:
                return Attempt(Verdict.OUT_OF_TIME, nodes, ())
            conflict = self.bound(node.members)
            if conflict is None:
                node.chosen = self.choose(node.members)
                if node.chosen < 0:
                    conflict = _hull([self.window[b] for b in node.members])
            if conflict is not None:
                conflict = self.leave(stack, conflict)
                continue
            node.inner_mark = len(self.trail)
            node.pending = self.put(node.chosen, node.members)
            solved = True
        if solved:
            return Attempt(Verdict.FOUND, nodes, tuple(self.offsets))
        return Attempt(Verdict.EXHAUSTED, nodes, ())

    def leave(self, stack: list[_Node], conflict: _Range) -> _Range:
        """Gives the node up; its conflict covers every branch whose failure it needs."""
        node = stack.pop()
        self.undo(node.mark)
        for window, reason in reversed(node.tried):
            if conflict.meets(window):
                conflict = _hull([conflict, window, reason])
        return conflict

    def set(self, values: list[int], index: int, value: int) -> None:
        self.trail.append((values, index, values[index]))
        values[index] = value

    def undo(self, mark: int) -> None:
        while len(self.trail) > mark:
            values, index, value = self.trail.pop()
            values[index] = value

    def reason(self, b: int) -> list[_Range]:
        """The windows that the lowest possible offset of b rests on."""
        windows = [self.window[b]]
        if self.skipped[b]:
            windows += [self.window[k] for k in self.near[b] if not self.placed[k]]
        return windows

    def bound(self, members: list[int]) -> _Range | None:
        """Sets ``lowest`` and ``level``; the conflict where the members cannot be placed."""
        size, ground, lowest, placed, level = self.size, self.ground, self.lowest, self.placed, self.level
        for b in members:
            lowest[b] = ground[b]
            if self.skipped[b]:
                ends = [max(ground[k] + size[k], ground[b] + 1) for k in self.near[b] if not placed[k]]
                if not ends:
                    return self.window[b]
                lowest[b] = min(ends)
        whole = _hull([self.window[b] for b in members])
        level[whole.low : whole.high] = self.skyline[whole.low : whole.high]
        order = sorted(members, key=lowest.__getitem__)
        for position, b in enumerate(order):
            for s in range(*self.window[b]):
                level[s] = max(level[s], lowest[b]) + size[b]
                if level[s] > self.capacity:
                    self.failures[s] += FAILED_BOUND
                    inside = _Range(s, s + 1)
                    return _hull(
                        [w for k in order[: position + 1] if self.window[k].meets(inside) for w in self.reason(k)]
                    )
        for b in members:
            if self.skipped[b]:
                above = [k for k in self.near[b] if not placed[k]]
                if all(lowest[k] >= ground[b] + size[b] for k in above):
                    return _hull([self.window[b], *(w for k in above for w in self.reason(k))])
        return None

    def choose(self, members: list[int]) -> int:
        """The best grounded buffer of the lowest level, -1 where all are skipped; ties go to the first."""
        active = [b for b in members if not self.skipped[b]]
        ground = min((self.ground[b] for b in active), default=0)
        best, best_score = -1, 0
        for b in active:
            if self.ground[b] != ground:
                continue
            low, high = self.window[b]
            gap = sum(ground - height for height in self.skyline[low:high]) // (high - low)
            score = self.score.fixed[b]
            score += self.score.crowd * ((max(self.level[low:high]) << 16) // self.capacity)
            score += self.score.conflict * log2_fixed(FAILED_BOUND + max(self.failures[low:high]))
            score -= self.score.waste * ((gap << 16) // self.capacity)
            if best < 0 or score > best_score:
                best, best_score = b, score
        return best

    def put(self, b: int, members: list[int]) -> list[list[int]]:
        """Places b on its ground; the other members in independent groups, the first last."""
        top = self.ground[b] + self.size[b]
        self.offsets[b] = self.ground[b]
        self.set(self.placed, b, 1)
        for s in range(*self.window[b]):
            self.set(self.skyline, s, top)
        for k in self.near[b]:
            if not self.placed[k] and self.ground[k] < top:
                self.set(self.ground, k, top)
                if self.skipped[k]:
                    self.set(self.skipped, k, 0)
        groups: list[list[int]] = []
        end = 0
        for k in members:
            if k == b:
                continue
            if not groups or self.window[k].low >= end:
                groups.append([])
            groups[-1].append(k)
            end = max(end, self.window[k].high)
        groups.reverse()
        return groups

    def skip(self, node: _Node) -> None:
        for k in node.members:
            if self.twins[k] == self.twins[node.chosen] and not self.skipped[k]:
                self.set(self.skipped, k, 1)
