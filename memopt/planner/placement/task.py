"""What the methods of the staged driver share: the best placement of a part so far, and the budget left."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from memopt.planner.placement.checking import find_fault
from memopt.planner.placement.instance import Part
from memopt.planner.placement.ordering import place_in_order
from memopt.planner.placement.problem import Buffer


@dataclass
class Task:
    """One part on its way to ``goal``, everything in units.

    A method calls :meth:`offer` for every placement it finds and :meth:`prove` for every lower bound; it stops when
    :attr:`done`, when its share of the time is over, or when it has nothing left to try. ``minimise`` says that the
    goal is a lower bound and any better peak is welcome; otherwise only a peak within the goal counts.
    """

    part: Part
    goal: int
    minimise: bool
    seed: int
    node_limit: int
    deadline: float
    lower: int = field(init=False)
    peak: int = field(init=False)
    offsets: tuple[int, ...] = field(init=False)
    method: str = field(default="greedy (largest first)", init=False)
    proof: str = field(default="max-live", init=False)
    remarks: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.lower = self.part.max_live
        # Something valid to start from, whatever the methods do.
        order = sorted(range(len(self.part)), key=lambda b: (-self.part.size[b], b))
        self.offsets = tuple(place_in_order(self.part, order, best_fit=True))
        self.peak = self._peak(self.offsets)

    @property
    def done(self) -> bool:
        """Nothing is left to gain: the goal is reached, or proven out of reach."""
        return self.peak <= max(self.goal, self.lower) or (self.lower > self.goal and not self.minimise)

    def seconds_left(self) -> float:
        """Until the deadline; 0 afterwards."""
        return max(0.0, self.deadline - time.monotonic())

    def prove(self, lower: int, proof: str) -> None:
        """No placement of this part has a peak below ``lower``."""
        if lower > self.lower:
            self.lower, self.proof = lower, proof

    def offer(self, offsets: Sequence[int], method: str) -> bool:
        """Takes a placement if it is better than the best so far; a faulty one is repaired first, never kept.

        Repair keeps only the order of the offsets: every buffer is placed again, lowest first, at the first free
        offset, which is valid by construction and checked again.
        """
        fault = find_fault(self._buffers, offsets)
        if fault is not None:
            order = sorted(range(len(self.part)), key=lambda i: (offsets[i], i) if i < len(offsets) else (0, i))
            offsets = place_in_order(self.part, order)
            self.remarks.append(f"{method} returned a faulty placement ({fault}); repaired")
            if find_fault(self._buffers, offsets) is not None:
                return False
        peak = self._peak(offsets)
        if peak >= self.peak:
            return False
        self.peak, self.offsets, self.method = peak, tuple(offsets), method
        return True

    def _peak(self, offsets: Sequence[int]) -> int:
        return max(at + size for at, size in zip(offsets, self.part.size, strict=True))

    @property
    def _buffers(self) -> list[Buffer]:
        part = self.part
        return [Buffer(a, b, size) for a, b, size in zip(part.low, part.high, part.size, strict=True)]


@dataclass(frozen=True)
class Method:
    """One way to place buffers.

    ``rank`` orders the methods; ``share`` is the fraction of the time left that it may take; ``missing()`` names the
    package that it lacks on this machine. ``default`` methods run without being asked for; one that stands in for
    another only where that one is missing.
    """

    name: str
    rank: int
    run: Callable[[Task], None]
    share: float = 1.0
    missing: Callable[[], str | None] = lambda: None
    default: bool = True
    stands_in_for: str | None = None
