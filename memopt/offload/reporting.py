"""What a step under a plan did, beside what the plan said it would do."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

_TOLERANCE = 0.05


@dataclass(frozen=True)
class StepReport:
    """One training step, planned and measured; bytes and seconds.

    Attributes:
        planned_peak_bytes, metered_peak_bytes: of the whole step; None where unknown.
        planned_swapped_bytes, swapped_bytes: put into the swap tier in the step.
        stall_seconds: compute waited so long for copies.
        replays: block calls replayed; ``whole_replays`` of them could not be replayed selectively, for ``reasons``.
    """

    planned_peak_bytes: int | None
    metered_peak_bytes: int | None
    planned_swapped_bytes: int | None
    swapped_bytes: int
    stall_seconds: float
    replays: int
    whole_replays: int
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        """Three lines for people."""
        lines = [
            f"peak: planned {_mib(self.planned_peak_bytes)}, metered {_mib(self.metered_peak_bytes)}",
            f"swapped: planned {_mib(self.planned_swapped_bytes)}, moved {_mib(self.swapped_bytes)}, "
            f"waited {self.stall_seconds:.3f} s",
            f"replayed: {self.replays} block calls, {self.whole_replays} of them whole",
        ]
        return "\n".join(lines + [f"  {reason}" for reason in self.reasons])


def _mib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**20:.1f} MiB"


def compare(plan: Any, metered: int | None, swapped: int, stall: float, counts: Any) -> StepReport:
    """The report of a step; warns where peak or swapped bytes are off by more than 5 %."""
    planned = getattr(plan, "peak_bytes", None)
    planned_swap = getattr(plan, "swapped_bytes", None)
    report = StepReport(
        planned, metered, planned_swap, swapped, stall, counts.replays, counts.whole, tuple(sorted(counts.reasons))
    )
    for what, want, got in (("peak", planned, metered), ("swapped bytes", planned_swap, swapped)):
        if want and got is not None and abs(got - want) > _TOLERANCE * want:
            warnings.warn(
                f"the plan promised {_mib(want)} of {what}, the step took {_mib(got)} ({got / want - 1:+.1%}); was it "
                "made for this optimizer, loss and device? handle.report tells more",
                stacklevel=2,
            )
    return report
