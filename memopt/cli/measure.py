"""``memopt probe`` and ``memopt bench``: what this machine can do, and how memopt does on it."""

from __future__ import annotations

import json
from dataclasses import asdict

import typer
from rich.console import Console

from memopt.cli.shared import Out


def probe_command(out: Out = None) -> None:
    """Measure this machine: FLOP/s, memory, host link and disk, as a hardware file for `memopt plan`."""
    from memopt.planner import probe
    from memopt.report import check_writable

    if out is not None:
        check_writable(out)
    measured = probe()
    text = json.dumps(asdict(measured), indent=2)
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")
    typer.echo(text)


def bench_command() -> None:
    """Compare this machine's optimizers, quantisers and losses with torch's, and with peers where installed."""
    import torch
    from rich.progress import track
    from rich.table import Table

    from memopt.benching import TABLES
    from memopt.report.terminal import format_seconds

    device = "cuda" if torch.cuda.is_available() else "cpu"
    console = Console()
    for title, measure in track(TABLES.items(), description="measuring", console=Console(stderr=True), transient=True):
        table = Table("", "median", "ratio", "", title=f"{title} on {device}", title_justify="left")
        for row in measure(device):
            table.add_row(row.name, format_seconds(row.seconds), f"{row.ratio:.2f}", row.note)
        console.print(table)
