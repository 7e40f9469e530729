"""The plain values of address planning: buffers with lifetimes in, offsets out."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


class Outcome(str, Enum):
    """What came of a placement. ``NOT_FOUND`` says nothing about whether one exists; ``IMPOSSIBLE`` is proven."""

    PLACED = "placed"
    NOT_FOUND = "not found"
    IMPOSSIBLE = "impossible"


@dataclass(frozen=True)
class Buffer:
    """A block of ``size`` bytes that is alive during ``[start, stop)``.

    Two buffers may share addresses unless their lifetimes meet; lifetimes are half-open, so ``[0, 3)`` and ``[3, 5)``
    do not meet. ``name`` is used in messages and files only.

    Raises:
        TypeError: a number that is not an integer.
        ValueError: a lifetime that is empty or reversed, or a negative size.
    """

    start: int
    stop: int
    size: int
    name: str = ""

    def __post_init__(self) -> None:
        for field in ("start", "stop", "size"):
            value = getattr(self, field)
            try:
                object.__setattr__(self, field, operator.index(value))
            except TypeError:
                raise TypeError(f"{self._label()}: {field} is {value!r}, expected an integer") from None
        if self.start >= self.stop:
            raise ValueError(f"{self._label()}: lifetime [{self.start}, {self.stop}) is empty, expected start < stop")
        if self.size < 0:
            raise ValueError(f"{self._label()}: size is {self.size}, expected 0 or more bytes")

    def _label(self) -> str:
        return f"Buffer {self.name!r}" if self.name else "Buffer"

    def meets(self, other: Buffer) -> bool:
        """Whether both are alive at some moment."""
        return self.start < other.stop and other.start < self.stop


@dataclass(frozen=True)
class Placement:
    """Where every buffer lies, and how good that is.

    ``offsets`` are bytes from the start of one arena, in the order of the buffers given; they are empty unless
    ``status`` is ``PLACED``. ``peak`` is the arena's size in bytes: of these offsets, or of the best placement found
    where nothing fitted into the capacity. No placement has a peak below ``lower_bound``; ``proven`` says that
    ``peak`` is the smallest possible. ``method`` names what found it, in ``seconds``; ``reason`` tells in one sentence
    how the result was obtained.
    """

    offsets: tuple[int, ...]
    peak: int
    lower_bound: int
    proven: bool
    method: str
    seconds: float
    status: Outcome = Outcome.PLACED
    reason: str = ""

    @property
    def gap(self) -> float:
        """How far ``peak`` may lie above the smallest possible one, as a fraction of ``lower_bound``."""
        return (self.peak - self.lower_bound) / self.lower_bound if self.lower_bound else 0.0


def max_live(buffers: Sequence[Buffer]) -> int:
    """The largest number of bytes alive at once: no placement has a smaller peak."""
    events = sorted([(b.start, b.size) for b in buffers] + [(b.stop, -b.size) for b in buffers])
    live = peak = 0
    for _, change in events:  # at one moment the negative changes come first: lifetimes are half-open
        live += change
        peak = max(peak, live)
    return peak
