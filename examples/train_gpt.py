"""Train a byte-level GPT twice, with plain torch and with memopt, and compare memory, speed and loss.

Both runs see the same model, data and seed; the only difference is the call to ``memopt.wrap``.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

import memopt
from examples.gpt import GPT, GPTConfig, batches, read_text
from memopt.report.html import check_installed

METERED_STEPS = 3  # the first allocates the optimizer state, later ones are alike; a metered step is not timed
MIB = 2**20


@dataclass
class Run:
    """What one training run measured; bytes and seconds."""

    peak_bytes: int = 0
    peak_by_category: dict[str, int] = field(default_factory=dict)
    predicted_peak_bytes: int = 0
    optimizer_state_bytes: int = 0
    step_seconds: float = 0.0
    final_loss: float = 0.0


@dataclass(frozen=True)
class Options:
    """The choices both runs share."""

    config: GPTConfig
    steps: int
    batch: int
    lr: float
    seed: int


def warmed_up(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """A linear warm-up over a tenth of the run, then constant."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, steps // 10)))


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    text: Tensor,
    options: Options,
    progress: Progress,
    name: str,
) -> tuple[Run, Any]:
    """Anyone's training loop; metered in its first steps, timed in the others. Returns the run and its timeline."""
    data = batches(text, options.batch, options.config.context, options.seed)
    schedule = warmed_up(optimizer, options.steps)
    bar = progress.add_task(name, total=options.steps)
    run, meter, losses, seconds = Run(), None, [], []

    def step(inputs: tuple[Tensor, Tensor]) -> float:
        loss = model(*inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        return loss.item()

    for index in range(options.steps):
        inputs = next(data)
        if index < METERED_STEPS:
            with memopt.meter(model, optimizer) as meter:
                losses.append(step(inputs))
            if meter.peak_bytes > run.peak_bytes:
                run.peak_bytes, run.peak_by_category = meter.peak_bytes, dict(meter.by_category)
        else:
            began = time.perf_counter()
            losses.append(step(inputs))
            seconds.append(time.perf_counter() - began)
        progress.update(bar, advance=1, description=f"{name}  loss {losses[-1]:.3f}")
    tail = max(1, options.steps // 8)
    run.final_loss = statistics.fmean(losses[-tail:])
    run.step_seconds = statistics.median(seconds)
    run.optimizer_state_bytes = state_bytes(optimizer)
    return run, meter.timeline if meter is not None else None


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors that an optimizer keeps between steps."""
    if hasattr(optimizer, "state_bytes"):
        return int(optimizer.state_bytes())
    return sum(
        value.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )


def make_model(options: Options) -> nn.Module:
    """The same weights for both runs."""
    torch.manual_seed(options.seed)
    return GPT(options.config)


def plain(text: Tensor, options: Options, progress: Progress) -> tuple[Run, Any]:
    """Train as torch does by itself."""
    model = make_model(options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
    inputs = next(batches(text, options.batch, options.config.context, options.seed))
    predicted = memopt.trace(model, inputs, optimizer=optimizer).peak_bytes
    run, timeline = train(model, optimizer, text, options, progress, "plain torch")
    run.predicted_peak_bytes = predicted
    return run, timeline


def wrapped(text: Tensor, options: Options, progress: Progress, name: str, budget: int) -> tuple[Run, Any]:
    """Train with memopt: the same loop, after one call."""
    inputs = next(batches(text, options.batch, options.config.context, options.seed))
    model, optimizer, plan = memopt.wrap(
        make_model(options), inputs=inputs, optimizer=name, lr=options.lr, budget=budget, hardware="cpu"
    )
    run, timeline = train(model, optimizer, text, options, progress, "memopt     ")
    run.predicted_peak_bytes = plan.peak_bytes
    return run, timeline


def comparison(runs: dict[str, Run], parameters: int) -> Table:
    """The table that the demo ends with."""
    ours, base = runs["memopt"], runs["plain"]
    table = Table(title="One training step of the same GPT", title_justify="left")
    for heading in ("", "plain torch", "memopt", "ratio"):
        table.add_column(heading, justify="left" if not heading else "right")

    def row(label: str, read: Any, form: Any, style: str | None = None) -> None:
        a, b = read(base), read(ours)
        table.add_row(label, form(a), form(b), f"{b / a:.3f}" if a else "-", style=style)

    def mib(size: float) -> str:
        return f"{size / MIB:.1f} MiB"

    row("metered peak", lambda r: r.peak_bytes, mib, "bold")
    for category in sorted(set(base.peak_by_category) | set(ours.peak_by_category)):
        row(f"  {category}", lambda r, c=category: r.peak_by_category.get(c, 0), mib)
    row("predicted peak", lambda r: r.predicted_peak_bytes, mib)
    row("  predicted / metered", lambda r: r.predicted_peak_bytes / r.peak_bytes, lambda x: f"{x:.3f}")
    row("optimizer state per parameter", lambda r: r.optimizer_state_bytes / parameters, lambda x: f"{x:.3f} B")
    row("seconds per step (median)", lambda r: r.step_seconds, lambda x: f"{x:.3f} s")
    row("final loss", lambda r: r.final_loss, lambda x: f"{x:.4f}")
    return table


def main(
    text: Annotated[Path | None, typer.Option(help="Train on this file instead of Python's own source.")] = None,
    steps: Annotated[int, typer.Option(min=METERED_STEPS + 1, help="Training steps of each run.")] = 40,
    batch: Annotated[int, typer.Option(min=1, help="Sequences in a batch.")] = 8,
    context: Annotated[int, typer.Option(min=8, help="Bytes in a sequence.")] = 256,
    layers: Annotated[int, typer.Option(min=1, help="Transformer blocks.")] = 6,
    width: Annotated[int, typer.Option(min=16, help="Width of the model.")] = 512,
    heads: Annotated[int, typer.Option(min=1, help="Attention heads; must divide the width.")] = 8,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 3e-4,
    seed: Annotated[int, typer.Option(help="Seed of weights and data.")] = 0,
    optimizer: Annotated[str, typer.Option(help="Optimizer of the wrapped run.")] = "adamw8bit",
    budget: Annotated[
        str, typer.Option(help="Memory of the wrapped run: a size such as 300MiB, or a share of the plain run's peak.")
    ] = "48%",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a report with both memory timelines to this file.")] = None,
) -> None:
    """Train the same GPT with plain torch and with memopt, and compare memory, speed and loss."""
    console = Console()
    try:
        if html is not None:
            check_installed()
        corpus = read_text(text)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        console.print(f"[red]error:[/red] {error}")
        raise typer.Exit(1) from error
    options = Options(GPTConfig(layers, width, heads, context), steps, batch, lr, seed)
    parameters = sum(p.numel() for p in make_model(options).parameters())
    console.print(
        f"GPT with {parameters / 1e6:.1f} million parameters, {batch} x {context} bytes a step, {steps} steps"
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        base, before = plain(corpus, options, progress)
        gc.collect()
        share = budget.removesuffix("%")
        allowed = int(base.peak_bytes * float(share) / 100) if share != budget else memopt.planner.parse_bytes(budget)
        ours, after = wrapped(corpus, options, progress, optimizer, allowed)
    runs = {"plain": base, "memopt": ours}
    console.print(comparison(runs, parameters))
    if json_file is not None:
        json_file.write_text(json.dumps({name: asdict(run) for name, run in runs.items()}, indent=2) + "\n")
        console.print(f"figures: {json_file}")
    if html is not None:
        from memopt.report import write_html

        write_html(html, title="Training a GPT: plain torch and memopt", runs={"plain torch": before, "memopt": after})
        console.print(f"report:  {html}")


if __name__ == "__main__":
    typer.run(main)
