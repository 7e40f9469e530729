"""Export as a trace for ui.perfetto.dev and chrome://tracing: Chrome's JSON trace event format.

Each run is a process with a counter of live bytes by category and, where they are known, its operations as slices.
Each map is a process whose storages are spans from birth to death; operation k begins at k microseconds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from memopt.files import write_whole
from memopt.report.boxes import Box
from memopt.report.series import RunLike, Series, as_series

_MICROSECONDS = 1e6


def write_perfetto(
    path: str | os.PathLike[str],
    *,
    runs: Mapping[str, RunLike],
    maps: Mapping[str, Sequence[Box]] | None = None,
) -> None:
    """Writes to ``path`` one trace of all ``runs`` and ``maps``, which are as for :func:`memopt.report.write_html`.

    Raises:
        ValueError, TypeError: neither a run nor a map, or a run that is no timeline.
    """
    if not runs and not maps:
        raise ValueError("runs and maps are empty, expected at least one name with its timeline or boxes")
    events: list[dict[str, Any]] = []
    for process, (name, run) in enumerate(runs.items(), 1):
        events += _process(process, name)
        events += _run(process, as_series(name, run))
    for process, (name, boxes) in enumerate((maps or {}).items(), 1 + len(runs)):
        events += _process(process, name)
        events += _map(process, boxes)
    text = json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}, separators=(",", ":"), allow_nan=False)
    write_whole(path, text)


def _process(process: int, name: str) -> Iterator[dict[str, Any]]:
    yield {"ph": "M", "name": "process_name", "pid": process, "tid": 0, "args": {"name": name}}
    yield {"ph": "M", "name": "thread_name", "pid": process, "tid": 1, "args": {"name": "operations"}}


def _run(process: int, series: Series) -> Iterator[dict[str, Any]]:
    starts = [seconds * _MICROSECONDS for seconds in series.seconds]
    stops = [*starts[1:], *starts[-1:]]
    for i, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        if series.labels[i]:
            yield {
                "ph": "X",
                "name": series.labels[i],
                "pid": process,
                "tid": 1,
                "ts": start,
                "dur": max(0.0, stop - start),
                "args": {"operation": series.index[i]},
            }
        live = {category: values[i] for category, values in series.by_category.items()}
        yield {"ph": "C", "name": "live bytes", "pid": process, "tid": 0, "ts": start, "args": live}


def _map(process: int, boxes: Sequence[Box]) -> Iterator[dict[str, Any]]:
    for number, box in enumerate(boxes):
        shared = {"cat": box.category, "name": box.name, "pid": process, "tid": 0, "id": f"{process}.{number}"}
        yield {**shared, "ph": "b", "ts": box.start, "args": {"bytes": box.bytes, "offset": box.offset}}
        yield {**shared, "ph": "e", "ts": box.stop}
    changes = sorted(
        [(box.start, box.bytes, box.category) for box in boxes]
        + [(box.stop, -box.bytes, box.category) for box in boxes]
    )
    live = dict.fromkeys((box.category for box in boxes), 0)
    for time, group in groupby(changes, key=lambda change: change[0]):
        for _, size, category in group:
            live[category] += size
        yield {"ph": "C", "name": "live bytes", "pid": process, "tid": 0, "ts": time, "args": dict(live)}
