"""``memopt place``: offsets for the buffers of a CSV file."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from memopt.cli.shared import FLAG, NOTHING_FITS, Out, progress


def place_command(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="CSV with the columns id, lower, upper, size; lifetimes half-open.")
    ],
    capacity: Annotated[
        int | None, typer.Option(min=1, metavar="BYTES", help="Bytes to fit into; default: as few as possible.")
    ] = None,
    out: Out = None,
    time_limit: Annotated[float, typer.Option(min=0.0, metavar="SECONDS", help="Seconds to search at most.")] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", metavar=FLAG, help="Print the figures as JSON.")] = False,
) -> None:
    """Give every buffer of a CSV file an offset, so that no two that live together overlap."""
    from memopt.planner.placement import Outcome, place, read_csv, write_csv
    from memopt.report import check_writable

    buffers = read_csv(file)
    if out is not None:
        check_writable(out)
    with progress("searching for offsets"):
        found = place(buffers, capacity=capacity, time_limit=time_limit)
    if out is not None and found.status is Outcome.PLACED:
        write_csv(out, buffers, found.offsets)
    if as_json:
        typer.echo(json.dumps(asdict(found)))
    else:
        from memopt.report.terminal import placement_page

        Console().print(placement_page(found, len(buffers), capacity))
    if found.status is not Outcome.PLACED:
        raise typer.Exit(NOTHING_FITS)
