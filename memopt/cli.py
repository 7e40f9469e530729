"""The command line: ``memopt plan | place | probe | bench``.

Exit status: 0 done, 1 bad input (one line on stderr, no traceback), 2 nothing fits, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
import typer.core
from rich.console import Console, RenderableType
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

NOTHING_FITS = 2
BAD_INPUT = 1
INTERRUPTED = 130
_USAGE: Any = typer.BadParameter.__mro__[2]  # options that cannot be read: click's own class, wherever typer has it

MODEL, BUDGET, TRAINING, SHARDING, OUTPUT = "Model", "Budget and hardware", "Training", "Sharding", "Output"
FLAG = ""  # no type beside options that take no value


class _PlainHelp:
    """Shows --help as a flag like the others, in the panel of the last option."""

    def get_help_option(self, ctx: Any) -> Any:
        option = super().get_help_option(ctx)  # type: ignore[misc]
        if option is not None:
            option.metavar = FLAG
            last: Any = self.params[-1] if self.params else None  # type: ignore[attr-defined]
            option.rich_help_panel = getattr(last, "rich_help_panel", None)
        return option


class _Command(_PlainHelp, typer.core.TyperCommand):
    pass


class _Group(_PlainHelp, typer.core.TyperGroup):
    pass


app = typer.Typer(
    name="memopt",
    cls=_Group,
    help="Train PyTorch models that do not fit in memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line; bad input is one clear line on stderr and exit status 1, never a traceback."""
    try:
        status = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        _stop("interrupted", INTERRUPTED)
    except BrokenPipeError:  # whoever read the output has seen enough; Python flushes what is left at exit
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        raise SystemExit(BAD_INPUT) from None
    except _USAGE as error:
        _stop(error.format_message(), BAD_INPUT)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        _stop(str(error), BAD_INPUT)
    raise SystemExit(status or 0)


def _stop(message: str, status: int) -> NoReturn:
    sys.stderr.write(f"memopt: {' '.join(message.split())}\n")
    raise SystemExit(status)


@contextmanager
def progress(text: str) -> Iterator[Callable[[str], None]]:
    """On a terminal: what is being done and for how long, on stderr, gone when it is over. Gives what changes it."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
        task = shown.add_task(text, total=None)
        yield lambda text: shown.update(task, description=text)


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", metavar=FLAG, help="Print the version and stop.")] = False,
) -> None:
    if version:
        from memopt.version import __version__

        typer.echo(__version__)
        raise typer.Exit


Out = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the result to this file.")]


@app.command("plan", cls=_Command, epilog="Example: memopt plan llama-3-8b --hardware rtx-4090 --budget 24GiB --fit")
def plan_command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            show_default=False,
            help="A preset, a transformers config.json or its folder, or python module:callable.",
        ),
    ],
    batch: Annotated[int, typer.Option(min=1, metavar="N", rich_help_panel=MODEL, help="Sequences on one device.")] = 1,
    seq: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", rich_help_panel=MODEL, help="Tokens in a sequence; default: the model's own."),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(metavar="NAME", rich_help_panel=MODEL, help="Of weights and activations: bf16, fp16 or fp32."),
    ] = "bf16",
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            rich_help_panel=BUDGET,
            help="Memory of the whole step, such as 24GiB; default: the device's.",
        ),
    ] = None,
    hardware: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            rich_help_panel=BUDGET,
            help="A device of the table, a JSON file of `memopt probe`, or auto.",
        ),
    ] = "auto",
    optimizer: Annotated[
        str, typer.Option(metavar="NAME", rich_help_panel=TRAINING, help="Its name, such as adamw8bit.")
    ] = "adamw8bit",
    fit_all: Annotated[
        bool,
        typer.Option(
            "--fit",
            metavar=FLAG,
            rich_help_panel=TRAINING,
            help="Also choose optimizer state, gradient release, chunked loss and offload.",
        ),
    ] = False,
    chunked_loss: Annotated[
        bool,
        typer.Option(
            "--chunked-loss",
            metavar=FLAG,
            rich_help_panel=TRAINING,
            help="Count on memopt.linear_cross_entropy: logits by chunks.",
        ),
    ] = False,
    release_gradients: Annotated[
        bool,
        typer.Option(
            "--release-gradients",
            metavar=FLAG,
            rich_help_panel=TRAINING,
            help="Count on memopt.optim.release_gradients.",
        ),
    ] = False,
    max_seq: Annotated[
        bool,
        typer.Option(
            "--max-seq", metavar=FLAG, rich_help_panel=TRAINING, help="Search for the longest sequence that fits."
        ),
    ] = False,
    max_batch: Annotated[
        bool,
        typer.Option(
            "--max-batch", metavar=FLAG, rich_help_panel=TRAINING, help="Search for the largest batch that fits."
        ),
    ] = False,
    data: Annotated[int, typer.Option(min=1, metavar="N", rich_help_panel=SHARDING, help="Data-parallel degree.")] = 1,
    zero: Annotated[
        int,
        typer.Option(
            min=0,
            max=3,
            metavar="STAGE",
            rich_help_panel=SHARDING,
            help="ZeRO stage over the data-parallel devices.",
        ),
    ] = 0,
    tensor: Annotated[
        int, typer.Option(min=1, metavar="N", rich_help_panel=SHARDING, help="Tensor-parallel degree.")
    ] = 1,
    context: Annotated[
        int, typer.Option(min=1, metavar="N", rich_help_panel=SHARDING, help="Context-parallel degree.")
    ] = 1,
    pipeline_stages: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            rich_help_panel=SHARDING,
            help="Also show what pipeline schedules hold, for so many stages.",
        ),
    ] = None,
    microbatches: Annotated[
        int, typer.Option(min=1, metavar="N", rich_help_panel=SHARDING, help="Microbatches of a pipeline's step.")
    ] = 8,
    as_json: Annotated[
        bool,
        typer.Option("--json", metavar=FLAG, rich_help_panel=OUTPUT, help="Print the plan as JSON instead of a page."),
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", rich_help_panel=OUTPUT, help="Write a report with the memory timeline."),
    ] = None,
    perfetto: Annotated[
        Path | None,
        typer.Option(metavar="FILE", rich_help_panel=OUTPUT, help="Write the timeline as a Perfetto trace."),
    ] = None,
    snapshot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", rich_help_panel=OUTPUT, help="Write the step for PyTorch's memory viewer."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", rich_help_panel=OUTPUT, help="Write the plan to this file.")
    ] = None,
) -> None:
    """Say whether a training step fits, and what to keep, swap and recompute so that it does."""
    from memopt.plan_command import Asked, answer, write_reports
    from memopt.planner import Degrees, parse_bytes
    from memopt.planner import hardware as find_hardware
    from memopt.planner.tracing import check_name
    from memopt.report import check_writable, terminal
    from memopt.report.html import check_installed

    if html is not None:
        check_installed()
    for file in (out, html, perfetto, snapshot):
        if file is not None:
            check_writable(file)
    if max_seq and max_batch:
        raise ValueError("--max-seq and --max-batch search for one size each; give one of them, and the other's size")
    device = find_hardware(hardware)
    allowed = parse_bytes(budget) if budget is not None else device.memory_bytes
    check_name(optimizer)
    asked = Asked(
        model=model,
        device=device,
        budget=allowed,
        batch=batch,
        seq=seq,
        dtype=dtype,
        optimizer=optimizer,
        degrees=Degrees(data=data, zero=zero, tensor=tensor, context=context),
        changes=("chunked loss",) * chunked_loss + ("gradients released",) * release_gradients,
        fit=fit_all,
        search="seq" if max_seq else "batch" if max_batch else None,
    )
    with progress("reading") as say:
        found = answer(asked, say)
        if out is not None:
            found.plan.save(out)
        write_reports(found, device, html, perfetto, snapshot, say)
    if as_json:
        from memopt.planner.strict_json import to_json

        typer.echo(json.dumps(to_json(found.plan)))
    else:
        pages: list[RenderableType] = [*found.pages]
        if pipeline_stages is not None:
            pages.append(terminal.pipeline_page(pipeline_stages, microbatches))
        Console().print(*pages, terminal.plan_page(found.plan, found.cure), sep="\n")
    if found.plan.status == "infeasible":
        raise typer.Exit(NOTHING_FITS)


@app.command("place", cls=_Command, epilog="Example: memopt place buffers.csv --out placed.csv")
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


@app.command("probe", cls=_Command, epilog="Example: memopt probe --out machine.json")
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


@app.command("bench", cls=_Command, epilog="Example: memopt bench")
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
