"""A self-contained HTML page: memory over time by category, and where every storage lies."""

from __future__ import annotations

import html
import importlib.util
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from memopt.files import write_whole
from memopt.planner import Category
from memopt.report.boxes import Box
from memopt.report.series import RunLike, as_series

_TEMPLATE = Path(__file__).with_name("page.html")
_COLOURS = {
    Category.WEIGHTS.value: "#4269d0",
    Category.GRADIENTS.value: "#ff725c",
    Category.OPTIMIZER.value: "#6cc5b0",
    Category.ACTIVATIONS.value: "#efb118",
    Category.LOGITS.value: "#a463f2",
    Category.TEMPORARIES.value: "#9c6b4e",
}


def write_html(
    path: str | os.PathLike[str],
    *,
    title: str,
    runs: Mapping[str, RunLike],
    maps: Mapping[str, Sequence[Box]] | None = None,
    facts: Mapping[str, str] | None = None,
    limit_bytes: int | None = None,
) -> None:
    """Writes one page that needs no network: a table of peaks, a zoomable timeline per run, a map per arena.

    Args:
        path: the file; it appears whole or not at all.
        title: the page's heading.
        runs: name to a plan's ``Timeline``, a meter, or its ``timeline``, drawn one below the other on one scale. A
            run without points (``None`` too) is shown as such.
        maps: name to the boxes of :func:`memopt.report.boxes_of`: lifetimes across, addresses up.
        facts: what the page says first, name by name.
        limit_bytes: drawn as a line across the timelines.

    Raises:
        ValueError, TypeError: no run, or one that is no timeline.
        ImportError: plotly, whose script the page contains, is not installed.

    Cost: 5 MB for the script, some 100 bytes per point and category.
    """
    if not runs:
        raise ValueError("runs is empty, expected at least one name with its timeline")
    series = {name: as_series(name, run) for name, run in runs.items()}
    found = _ordered(
        [*(category for one in series.values() for category in one.by_category)]
        + [box.category for boxes in (maps or {}).values() for box in boxes]
    )
    data = {
        "categories": found,
        "colours": _COLOURS,
        "facts": dict(facts or {}),
        "limit": limit_bytes,
        "runs": [
            {
                "name": name,
                "index": one.index,
                "seconds": [round(seconds, 9) for seconds in one.seconds],
                "labels": one.labels,
                "series": one.by_category,
                "total": one.total,
                "peak": one.peak,
            }
            for name, one in series.items()
        ],
        "maps": [
            {"name": name, "boxes": [[b.start, b.stop, b.offset, b.bytes, b.name, b.category] for b in boxes]}
            for name, boxes in (maps or {}).items()
        ],
    }
    parts = {"@TITLE@": html.escape(title), "@PLOTLY@": _plotly(), "@DATA@": _script_json(data)}
    template = _TEMPLATE.read_text(encoding="utf-8")
    page = re.sub("|".join(parts), lambda match: parts[match.group()], template)
    write_whole(path, page)


def _ordered(categories: Iterable[str]) -> list[str]:
    known = list(_COLOURS)
    return sorted(set(categories), key=lambda name: (known.index(name) if name in known else len(known), name))


def check_installed() -> None:
    """Call it before the work whose report is to be written.

    Raises:
        ModuleNotFoundError: plotly is not installed; the message says how to get it.
    """
    if importlib.util.find_spec("plotly") is None:
        raise ModuleNotFoundError("the HTML report needs plotly: pip install 'memopt[report]'", name="plotly")


def _plotly() -> str:
    check_installed()
    from plotly.offline import get_plotlyjs

    script: str = get_plotlyjs()
    return script


def _script_json(data: Any) -> str:
    """JSON that may stand inside a script element whatever the names contain."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
