"""``memopt plan``: its options, and what is shown of the answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, RenderableType

from memopt.cli.shared import FLAG, NOTHING_FITS, progress

MODEL, BUDGET, TRAINING, SHARDING, OUTPUT = "Model", "Budget and hardware", "Training", "Sharding", "Output"


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
    tiles: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            rich_help_panel=TRAINING,
            help="Run MLPs and the like in N tiles; default: only where nothing fits otherwise.",
        ),
    ] = None,
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
        tiles=tiles,
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
