"""What a simulated step came to."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

from memopt.planner.plan_file import Timeline
from memopt.planner.values import Category, Storage


@dataclass
class Simulation:
    """What happened: bytes at the peak and over time, seconds by what they were spent on, bytes swapped.

    ``allocations`` are all that was held, with lifetimes in numbers of ``moments``.
    """

    broken: str | None = None
    peak_bytes: int = 0
    peak_at: str = ""
    peak_index: int = 0
    by_category: dict[str, int] = field(default_factory=dict)
    compute_seconds: float = 0.0
    recompute_seconds: float = 0.0
    stall_seconds: float = 0.0
    compression_seconds: float = 0.0
    swapped_bytes: int = 0
    host_bytes: int = 0
    moments: list[tuple[float, tuple[int, ...]]] = field(default_factory=list)
    allocations: list[Storage] = field(default_factory=list)

    @property
    def step_seconds(self) -> float:
        """All seconds of the step."""
        return self.compute_seconds + self.recompute_seconds + self.stall_seconds + self.compression_seconds

    @property
    def timeline(self) -> Timeline:
        """Bytes by category over time, thinned to at most 2000 moments that keep every local peak's height."""
        chosen = thin(self.moments, 2000)
        names = [category.value for category in Category]
        return Timeline(
            tuple(seconds for seconds, _ in chosen),
            {name: tuple(sizes[n] for _, sizes in chosen) for n, name in enumerate(names)},
        )


def thin(moments: list[tuple[float, tuple[int, ...]]], most: int) -> list[tuple[float, tuple[int, ...]]]:
    """At most ``most`` of the moments, out of each stretch the fullest."""
    if len(moments) <= most:
        return moments
    edges = [len(moments) * n // most for n in range(most + 1)]
    return [max(moments[a:b], key=lambda m: sum(m[1])) for a, b in pairwise(edges)]
