"""The command line: ``memopt plan | place | probe | bench``.

Exit status: 0 done, 1 bad input (one line on stderr, no traceback), 2 nothing fits.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, RenderableType

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
    fit_all: Annotated[
        bool, typer.Option("--fit", help="Also choose optimizer state, gradient release, chunked loss and offload.")
    ] = False,
    max_seq: Annotated[bool, typer.Option("--max-seq", help="Search for the longest sequence that fits.")] = False,
    max_batch: Annotated[bool, typer.Option("--max-batch", help="Search for the largest batch that fits.")] = False,
    data: Annotated[int, typer.Option(min=1, help="Data-parallel degree.")] = 1,
    zero: Annotated[int, typer.Option(min=0, max=3, help="ZeRO stage over the data-parallel devices.")] = 0,
    tensor: Annotated[int, typer.Option(min=1, help="Tensor-parallel degree.")] = 1,
    context: Annotated[int, typer.Option(min=1, help="Context-parallel degree.")] = 1,
    pipeline_stages: Annotated[
        int | None, typer.Option(min=1, help="Also show what pipeline schedules hold, for so many stages.")
    ] = None,
    microbatches: Annotated[int, typer.Option(min=1, help="Microbatches of a pipeline's step.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON instead of a page.")] = False,
    html: Html = None,
    perfetto: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the timeline as a Perfetto trace.")
    ] = None,
    out: Out = None,
) -> None:
    """Say whether a training step fits, and what to keep, swap and recompute so that it does."""
    from memopt.planner import Degrees, Trace, find_model, fit, largest_that_fits, plan, shard, trace
    from memopt.planner import hardware as find_hardware
    from memopt.report import terminal

    device = find_hardware(hardware)
    allowed = budget or device.memory_bytes
    degrees = Degrees(data=data, zero=zero, tensor=tensor, context=context)
    pages: list[RenderableType] = []
    with Console(stderr=True).status("tracing one training step", spinner="dots") as status:

        def traced(batch_size: int, tokens: int | None) -> Trace:
            found = find_model(model, batch=batch_size, tokens=tokens, dtype=dtype)
            on = "cpu" if device.kind == "cpu" else "cuda"
            step = trace(found.model, found.inputs, loss_fn=found.loss_fn, optimizer=optimizer, device=on)
            return shard(replace(step, model=found.name), degrees)

        if max_seq or max_batch:
            status.update("searching for the largest size that fits")
            size, best = (
                largest_that_fits(lambda n: traced(batch, n), allowed, device, step=128)
                if max_seq
                else largest_that_fits(lambda n: traced(n, seq), allowed, device)
            )
            pages.append(f"Largest {'sequence' if max_seq else 'batch'} that fits: {size}\n")
            result = best or plan(traced(batch if max_seq else 1, 128 if max_seq else seq), allowed, device)
        else:
            step = traced(batch, seq)
            status.update("deciding what to keep, swap and recompute")
            if fit_all:
                choices = fit(step, allowed, device)
                result = (choices.best or choices.pareto[0]).plan
                pages.append(terminal.fit_page(choices))
            else:
                result = plan(step, budget=allowed, hardware=device)
    if pipeline_stages is not None:
        pages.append(terminal.pipeline_page(pipeline_stages, microbatches))
    if out is not None:
        result.save(out)
    runs = {"before": result.timeline_before, "after": result.timeline_after}
    if html is not None:
        from memopt.report import write_html

        write_html(html, title=f"{result.model} on {result.hardware}", runs=runs)
    if perfetto is not None:
        from memopt.report import write_perfetto

        write_perfetto(perfetto, runs=runs)
    if as_json:
        from memopt.planner.strict_json import to_json

        typer.echo(json.dumps(to_json(result)))
    else:
        Console().print(*pages, terminal.plan_page(result), sep="\n")
    if result.status == "infeasible":
        raise typer.Exit(NOTHING_FITS)


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
