"""The command line: ``memopt plan | place | probe | bench``.

Exit status: 0 done, 1 bad input (one line on stderr, no traceback), 2 nothing fits.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from memopt.planner import Plan

NOTHING_FITS = 2
BAD_INPUT = 1

app = typer.Typer(
    name="memopt",
    help="Train PyTorch models that do not fit in memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line; bad input is one clear line on stderr and exit status 1, never a traceback."""
    try:
        app()
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.stderr.write(f"memopt: {' '.join(str(error).split())}\n")
        raise SystemExit(BAD_INPUT) from error


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        from memopt.version import __version__

        typer.echo(__version__)
        raise typer.Exit


Html = Annotated[Path | None, typer.Option(metavar="FILE", help="Write a report with the memory timeline.")]
Out = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the result to this file.")]


@app.command("plan")
def plan_command(
    model: Annotated[
        str,
        typer.Argument(help="A preset, a transformers config.json or its folder, or python module:callable."),
    ],
    budget: Annotated[
        str | None, typer.Option(help="Memory of the whole step, such as 24GiB; default: the device's.")
    ] = None,
    hardware: Annotated[
        str, typer.Option(help="A device of the table, a JSON file of `memopt probe`, or auto.")
    ] = "auto",
    batch: Annotated[int, typer.Option(min=1, help="Sequences on one device.")] = 1,
    seq: Annotated[int | None, typer.Option(min=1, help="Tokens in a sequence; default: the model's own.")] = None,
    dtype: Annotated[str, typer.Option(help="Of weights and activations: bf16, fp16 or fp32.")] = "bf16",
    optimizer: Annotated[str, typer.Option(help="Its name, such as adamw8bit.")] = "adamw8bit",
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON instead of a page.")] = False,
    html: Html = None,
    out: Out = None,
) -> None:
    """Say whether a training step fits, and what to keep, swap and recompute so that it does."""
    from memopt.planner import find_model, plan, trace
    from memopt.planner import hardware as find_hardware

    console = Console()
    device = find_hardware(hardware)
    with Console(stderr=True).status("tracing one training step", spinner="dots") as status:
        found = find_model(model, batch=batch, tokens=seq, dtype=dtype)
        traced = trace(found.model, found.inputs, loss_fn=found.loss_fn, optimizer=optimizer)
        traced = replace(traced, model=found.name)
        status.update("deciding what to keep, swap and recompute")
        result = plan(traced, budget=budget or device.memory_bytes, hardware=device)
    if out is not None:
        result.save(out)
    if html is not None:
        _write_html(html, result)
    if as_json:
        from memopt.planner.strict_json import to_json

        typer.echo(json.dumps(to_json(result)))
    else:
        from memopt.report.terminal import plan_page

        console.print(plan_page(result))
    if result.status == "infeasible":
        raise typer.Exit(NOTHING_FITS)


def _write_html(path: Path, plan: Plan) -> None:
    from memopt.report import write_html

    write_html(
        path,
        title=f"{plan.model} on {plan.hardware}",
        runs={"before": plan.timeline_before, "after": plan.timeline_after},
    )


@app.command("place")
def place_command(
    file: Annotated[Path, typer.Argument(help="CSV with the columns id, lower, upper, size; lifetimes half-open.")],
    capacity: Annotated[int | None, typer.Option(min=1, help="Bytes to fit into; default: as few as possible.")] = None,
    out: Out = None,
    time_limit: Annotated[float, typer.Option(min=0.0, help="Seconds to search at most.")] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Give every buffer of a CSV file an offset, so that no two that live together overlap."""
    from memopt.planner.placement import Outcome, place, read_csv, write_csv

    buffers = read_csv(file)
    with Console(stderr=True).status("searching for offsets", spinner="dots"):
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


@app.command("probe")
def probe_command(out: Out = None) -> None:
    """Measure this machine: FLOP/s, memory, host link and disk, as a hardware file for `memopt plan`."""
    from memopt.planner import probe

    measured = probe()
    text = json.dumps(asdict(measured), indent=2)
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")
    typer.echo(text)


@app.command("bench")
def bench_command() -> None:
    """Compare this machine's optimizers, quantisers and losses with torch's, and with peers where installed."""
    from rich.progress import track
    from rich.table import Table

    from memopt.benching import TABLES
    from memopt.report.terminal import format_seconds

    device = "cuda" if torch_has_cuda() else "cpu"
    console = Console()
    for title, measure in track(TABLES.items(), description="measuring", console=Console(stderr=True), transient=True):
        table = Table("", "median", "ratio", "", title=f"{title} on {device}", title_justify="left")
        for row in measure(device):
            table.add_row(row.name, format_seconds(row.seconds), f"{row.ratio:.2f}", row.note)
        console.print(table)


def torch_has_cuda() -> bool:
    """Whether torch sees a GPU; imports torch only when asked."""
    import torch

    return torch.cuda.is_available()
