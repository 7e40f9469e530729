"""From a tracker's records to categories and to live bytes over time.

Categories are settled when everything is known: a storage that was claimed (weight, gradient, optimizer state, loss
function's operand) stays so; what is born in the loss, or in backward before the gradient of the model's output is
complete, belongs to logits and loss; what is born before backward and still alive when it starts is an activation;
what an optimizer's step leaves behind is optimizer state; all else is temporary.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from memopt.planner.tracking.records import History, Record
from memopt.planner.values import Category, Phase

CATEGORIES = tuple(Category)


def settle(history: History) -> list[Category]:
    """The category of every record, in the order of ``history.records``."""
    last_forward = max((i for i, phase in enumerate(history.phases) if phase is Phase.FORWARD), default=-1)
    return [_settle_one(record, history, last_forward) for record in history.records]


def _settle_one(record: Record, history: History, last_forward: int) -> Category:
    if record.category is not None:
        return record.category
    phase = Phase.FORWARD if record.producer is None else history.phases[record.producer]
    if phase is Phase.LOSS:
        return Category.LOGITS
    if phase is Phase.BACKWARD:
        in_loss = any(start <= record.birth < stop for start, stop in history.logit_gradients)
        return Category.LOGITS if in_loss else Category.TEMPORARIES
    if phase is Phase.OPTIMIZER:
        stays = record.death is None or (record.death <= last_forward and Phase.FORWARD in (
            history.phases[record.birth : record.death]
        ))  # fmt: skip
        return Category.OPTIMIZER if stays else Category.TEMPORARIES
    starts = history.backward_starts
    following = bisect_left(starts, record.birth)
    if following < len(starts) and (record.death is None or starts[following] < record.death):
        return Category.ACTIVATIONS
    return Category.TEMPORARIES


@dataclass(frozen=True)
class Profile:
    """Live bytes after every operation, in total and by category, and where they peak."""

    live_bytes: tuple[int, ...]
    by_category: dict[Category, tuple[int, ...]]
    peak_bytes: int
    peak_index: int

    def at(self, index: int) -> dict[Category, int]:
        """Live bytes by category after one operation."""
        return {category: series[index] for category, series in self.by_category.items()}


def profile(history: History, categories: list[Category], device: str | None = None) -> Profile:
    """Adds up the records of one device type (None: all of them) over time."""
    length = max(1, len(history.names))
    changes = {category: [0] * (length + 1) for category in CATEGORIES}
    for record, category in zip(history.records, categories, strict=True):
        if device is None or record.device == device:
            row = changes[category]
            row[min(record.birth, length)] += record.bytes
            if record.death is not None and record.death < length:
                row[record.death] -= record.bytes
    series: dict[Category, tuple[int, ...]] = {}
    for category, row in changes.items():
        level, levels = 0, []
        for change in row[:length]:
            level += change
            levels.append(level)
        series[category] = tuple(levels)
    live = tuple(map(sum, zip(*series.values(), strict=True)))
    peak = max(live)
    return Profile(live, series, peak, live.index(peak))
