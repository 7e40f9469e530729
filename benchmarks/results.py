"""Keeps a benchmark's figures: one JSON and one Markdown file named by date, device and benchmark."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

FOLDER = Path(__file__).parent / "results"


def save(
    name: str, title: str, rows: Sequence[Mapping[str, Any]], notes: Sequence[str] = (), *, device: str = "cpu"
) -> tuple[Path, Path]:
    """Writes ``DATE-device-name.json`` and ``.md`` under ``benchmarks/results/``; returns their paths.

    Args:
        name: of the benchmark, as in ``python -m benchmarks.NAME``.
        title: the table's heading.
        rows: one mapping for each row; the columns are their keys in order of first appearance.
        notes: lines above the table, such as the command.
        device: ``"cpu"`` or a short name of the GPU.
    """
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    machine = f"{processor()}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    report = {"date": date, "machine": machine, "title": title, "notes": list(notes), "rows": [dict(r) for r in rows]}
    FOLDER.mkdir(exist_ok=True)
    stem = FOLDER / f"{date}-{device}-{name}"
    paths = stem.with_suffix(".json"), stem.with_suffix(".md")
    paths[0].write_text(json.dumps(report, indent=1) + "\n")
    paths[1].write_text(markdown(title, rows, [f"{machine}, {date}.", *notes]))
    return paths


def markdown(title: str, rows: Sequence[Mapping[str, Any]], notes: Sequence[str] = ()) -> str:
    """A heading, paragraphs and a table."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"# {title}", ""]
    for note in notes:
        lines += [note, ""]
    lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += [f"| {' | '.join(text(row.get(column)) for column in columns)} |" for row in rows]
    return "\n".join([*lines, ""])


def text(value: Any) -> str:
    """A cell: numbers to three places, nothing for None."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return "" if value is None else str(value)


def show(title: str, rows: Sequence[Mapping[str, Any]], width: int = 130) -> None:
    """Print rows as a table under a title."""
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(text(value) for value in row.values()))
    Console(width=width).print(table)


def processor() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
