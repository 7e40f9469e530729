"""``memopt.meter()``: the peak memory of whatever runs inside it, by category, measured storage by storage.

    with memopt.meter() as m:
        loss = model(tokens).mean(); loss.backward(); optimizer.step(); optimizer.zero_grad()
    m.peak_bytes, m.by_category, m.timeline

The storages of tensors are followed by a dispatch mode (``memopt.planner.tracking``), so that the figure is the same
quantity that ``memopt.trace`` predicts; on CUDA the allocator's own statistics stand beside it. Cost: some 10 to 20
microseconds per operation, one walk over Python's objects at the start (about 0.1 s), no tensor copied or kept alive.
"""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from memopt.planner.tracking import Profile, StorageTracker, profile, settle
from memopt.planner.values import Category


@dataclass(frozen=True)
class Sample:
    """The state after one operation: its name and phase, seconds since the start, live bytes by category."""

    index: int
    name: str
    phase: str
    seconds: float
    live_bytes: int
    by_category: dict[str, int]


class Meter:
    """Measures from ``with`` to its end; the figures are there after it. :func:`memopt.meter` makes it.

    Args:
        model: count the weights, buffers and gradients of this module (or these) only.
        optimizer: count the state of this optimizer (or these) only.
        device: device type to count; default: the one that holds most of the weights.

    Attributes:
        peak_bytes: most bytes of tensor storages alive at once on ``device``, the whole step: weights, gradients,
            optimizer state, activations, logits and loss, temporaries.
        by_category: name of the category to its bytes at that peak; they add up to ``peak_bytes``.
        device: the device type that was counted: the one with most weights.
        allocator: on CUDA ``allocated_bytes`` and ``reserved_bytes``, the caching allocator's own peaks; else empty.
        peak_resident_bytes: largest resident size of the process so far, as the operating system counts it.
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module] | None = None,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        device: str | None = None,
    ) -> None:
        self._models = _several(model, nn.Module, "model")
        self._optimizers = _several(optimizer, Optimizer, "optimizer")
        self.peak_bytes = 0
        self.by_category: dict[str, int] = {}
        self.device = device or ""
        self.allocator: dict[str, int] = {}
        self.peak_resident_bytes = 0
        self._tracker = StorageTracker()
        self._profile: Profile | None = None

    def __enter__(self) -> Meter:
        if self._profile is not None:
            raise ValueError("this meter has measured already; make a new one with memopt.meter()")
        if _has_statistics():
            torch.cuda.reset_peak_memory_stats()
        models, optimizers = self._models, self._optimizers
        if models is None or optimizers is None:
            found = list(_alive((nn.Module, Optimizer)))
            models = [x for x in found if isinstance(x, nn.Module)] if models is None else models
            optimizers = [x for x in found if isinstance(x, Optimizer)] if optimizers is None else optimizers
        for one in models:
            self._tracker.adopt_module(one)
        for each in optimizers:
            self._tracker.adopt_optimizer(each)
        self._tracker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        tracker = self._tracker
        for optimizer in self._optimizers or ():
            tracker.adopt_optimizer(optimizer)
        tracker.stop()
        history = tracker.history
        categories = settle(history)
        if not self.device:
            weights: Counter[str] = Counter()
            for record, category in zip(history.records, categories, strict=True):
                weights[record.device] += record.bytes * (1024 if category is Category.WEIGHTS else 1)
            self.device = weights.most_common(1)[0][0] if weights else "cpu"
        self._profile = profile(history, categories, self.device)
        self.peak_bytes = self._profile.peak_bytes
        self.by_category = {c.value: size for c, size in self._profile.at(self._profile.peak_index).items()}
        self.peak_resident_bytes = _peak_resident_bytes()
        if _has_statistics():
            self.allocator = {
                "allocated_bytes": torch.cuda.max_memory_allocated(),
                "reserved_bytes": torch.cuda.max_memory_reserved(),
            }

    @property
    def timeline(self) -> list[Sample]:
        """Live bytes after every operation, in total and by category; empty before the measurement has ended."""
        if self._profile is None:
            return []
        seen, levels = self._tracker.history, self._profile
        return [
            Sample(
                index,
                seen.names[index],
                seen.phases[index].value,
                seen.seconds[index],
                levels.live_bytes[index],
                {category.value: series[index] for category, series in levels.by_category.items()},
            )
            for index in range(len(seen.names))
        ]

    @property
    def peak_by_category(self) -> dict[str, int]:
        """Each category's own peak; they need not come at the same time and need not add up."""
        if self._profile is None:
            return {}
        return {category.value: max(series) for category, series in self._profile.by_category.items()}


def meter(
    model: nn.Module | Sequence[nn.Module] | None = None,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    device: str | None = None,
) -> Meter:
    """A meter to be entered with ``with``.

    Without arguments every module and optimizer that is alive in the process counts, used or not, found by a walk over
    Python's objects; other tensors count as soon as an operation inside the ``with`` touches them.

    Args:
        model: count the weights, buffers and gradients of this module (or these) only.
        optimizer: count the state of this optimizer (or these) only.
        device: device type to count, such as "cuda"; default: the one that holds most of the weights.

    Raises:
        TypeError: ``model`` or ``optimizer`` is of another type.
    """
    return Meter(model, optimizer, device)


def _has_statistics() -> bool:
    """Whether CUDA's allocator counts; a pluggable one, such as that of ``memopt.offload.Arena``, refuses to."""
    return torch.cuda.is_available() and torch.cuda.get_allocator_backend() != "pluggable"


def _peak_resident_bytes() -> int:
    """The process's largest resident size so far; 0 where the system does not tell."""
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _several(value: Any, kind: type, argument: str) -> list[Any] | None:
    if value is None:
        return None
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    for item in items:
        if not isinstance(item, kind):
            raise TypeError(f"{argument} must be a {kind.__name__} or a list of them, not {type(item).__name__}")
    return items


def _alive(kinds: tuple[type, ...]) -> Iterator[Any]:
    for thing in gc.get_objects():
        if issubclass(type(thing), kinds):
            yield thing
