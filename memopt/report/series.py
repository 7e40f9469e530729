"""Memory over time as the reports draw it, from whatever measured or predicted it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from memopt.planner import Timeline

LONGEST = 4000
"""Points drawn per run; of more, each stretch of equal length keeps its highest point, so peaks stay exact."""


class SampleLike(Protocol):
    """What a metered timeline consists of (:class:`memopt.metering.Sample`)."""

    @property
    def name(self) -> str: ...
    @property
    def phase(self) -> str: ...
    @property
    def seconds(self) -> float: ...
    @property
    def by_category(self) -> dict[str, int]: ...


class Metered(Protocol):
    """What has such a timeline (:class:`memopt.metering.Meter`)."""

    @property
    def timeline(self) -> Sequence[SampleLike]: ...


RunLike = Timeline | Metered | Sequence[SampleLike] | None


@dataclass(frozen=True)
class Series:
    """Live bytes by category from point to point; ``labels`` name the operation at each point where it is known.

    ``index`` is the number of the operation (or of the point) in the full run, before any thinning.
    """

    index: tuple[int, ...]
    seconds: tuple[float, ...]
    labels: tuple[str, ...]
    by_category: dict[str, tuple[int, ...]]

    @property
    def total(self) -> tuple[int, ...]:
        """Live bytes at each point."""
        return tuple(map(sum, zip(*self.by_category.values(), strict=True))) if self.by_category else ()

    @property
    def peak(self) -> dict[str, int]:
        """Bytes by category at the highest point; empty for an empty run."""
        total = self.total
        if not total:
            return {}
        at = total.index(max(total))
        return {category: values[at] for category, values in self.by_category.items()}


def as_series(name: str, run: RunLike) -> Series:
    """Reads a plan's :class:`~memopt.planner.Timeline`, a meter, or a meter's ``timeline``; ``None`` is an empty run.

    Raises:
        TypeError: ``run`` is none of these; the message names the run.
        ValueError: a timeline whose categories and seconds differ in length.
    """
    if run is None:
        return Series((), (), (), {})
    if isinstance(run, Timeline):
        for category, values in run.by_category.items():
            if len(values) != len(run.seconds):
                raise ValueError(f"run {name!r}: {len(values)} values of {category} for {len(run.seconds)} moments")
        count = len(run.seconds)
        return _thin(Series(tuple(range(count)), tuple(run.seconds), ("",) * count, dict(run.by_category)))
    samples = run if isinstance(run, Sequence) else getattr(run, "timeline", None)
    if not isinstance(samples, Sequence) or not all(hasattr(sample, "by_category") for sample in samples):
        raise TypeError(f"run {name!r} is {type(run).__name__}, expected a Timeline, a meter, or a meter's timeline")
    categories = list(dict.fromkeys(category for sample in samples for category in sample.by_category))
    return _thin(
        Series(
            tuple(range(len(samples))),
            tuple(sample.seconds for sample in samples),
            tuple(f"{sample.name} ({sample.phase})" for sample in samples),
            {c: tuple(sample.by_category.get(c, 0) for sample in samples) for c in categories},
        )
    )


def _thin(series: Series) -> Series:
    count = len(series.index)
    if count <= LONGEST:
        return series
    total = series.total
    edges = [count * k // LONGEST for k in range(LONGEST + 1)]
    kept = [max(range(low, high), key=total.__getitem__) for low, high in pairwise(edges)]
    return Series(
        tuple(series.index[i] for i in kept),
        tuple(series.seconds[i] for i in kept),
        tuple(series.labels[i] for i in kept),
        {category: tuple(values[i] for i in kept) for category, values in series.by_category.items()},
    )
