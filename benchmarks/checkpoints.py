"""What a save costs the training loop: asynchronous and blocking, of a model of 100 million parameters with AdamW8bit.

Run as ``python -m benchmarks.checkpoints``. Ways of saving take turns within one process, each between training steps
of the same loop. The *stall* is how long the call keeps the loop; *steps after* is what the steps that run while the
save is written take, compared with as many that run undisturbed. Everything is flushed to the disk in every way.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed.checkpoint as dcp
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.results import save as save_results
from examples.gpt import GPT, GPTConfig
from memopt.integrations.checkpoints import Checkpoints, Saving
from memopt.optim import AdamW8bit

MIB = 2**20


def plain_file(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """What most loops do: one pickle, flushed."""
    with (folder / "plain.pt").open("wb") as file:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.flush()
        os.fsync(file.fileno())


def engine(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """torch.distributed.checkpoint by itself, blocking."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        dcp.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=folder / "engine")


def main(
    layers: Annotated[int, typer.Option(help="Blocks of width 768; 14 make 100 million parameters.")] = 14,
    rounds: Annotated[int, typer.Option(help="Saves of each kind.")] = 5,
    steps: Annotated[int, typer.Option(help="Training steps after each save.")] = 4,
    folder: Annotated[Path | None, typer.Option(help="Where to write; a temporary folder by default.")] = None,
    save: Annotated[bool, typer.Option("--save", help="Keep the table under benchmarks/results/.")] = False,
) -> None:
    """Measure stalls and the steps after them, and print a table."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(layers=layers, width=768, heads=12, context=128))
    optimizer = AdamW8bit(model.parameters(), lr=1e-4)
    tokens = torch.randint(256, (1, 64))

    def train(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            model(tokens, tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
        return time.perf_counter() - began

    with (
        tempfile.TemporaryDirectory(dir=folder) as temporary,
        Checkpoints(Path(temporary) / "ours") as checkpoints,
        Checkpoints(Path(temporary) / "overlapping", overlap=True) as overlapping,
    ):
        number = iter(range(10**6))
        ways: dict[str, Callable[[], Saving | None]] = {
            "no save": lambda: None,
            "memopt, asynchronous, overlap=True": lambda: overlapping.save(next(number), model, optimizer),
            "memopt, asynchronous": lambda: checkpoints.save(next(number), model, optimizer),
            "memopt, blocking": lambda: checkpoints.save(next(number), model, optimizer, blocking=True),
            "torch.distributed.checkpoint.save": lambda: engine(Path(temporary), model, optimizer),
            "torch.save and fsync": lambda: plain_file(Path(temporary), model, optimizer),
        }
        stalls: dict[str, list[float]] = {way: [] for way in ways}
        after: dict[str, list[float]] = {way: [] for way in ways}
        train(1)
        for _ in range(rounds + 1):
            for way, call in ways.items():
                os.sync()
                began = time.perf_counter()
                saving = call()
                kept = time.perf_counter() - began
                after[way].append(train(steps))
                waited = saving.wait() and saving.stall_seconds if saving is not None else 0.0
                stalls[way].append(max(kept, waited))  # with overlap, the step after waits too
        size = sum(f.stat().st_size for f in (Path(temporary) / "ours").rglob("*.safetensors")) / checkpoints.keep

    def middle(values: list[float]) -> float:
        return statistics.median(values[1:])  # the first round allocates buffers

    base, undisturbed = middle(stalls["memopt, blocking"]), middle(after["no save"])
    rows = [
        {
            "save": way,
            "stall, s": f"{middle(stalls[way]):.3f}",
            "least, s": f"{min(stalls[way][1:]):.3f}",
            "of blocking": f"{middle(stalls[way]) / base:.3f}",
            f"{steps} steps after, s": f"{middle(after[way]):.2f}",
            "longer by, s": f"{middle(after[way]) - undisturbed:+.2f}",
        }
        for way in ways
    ]
    count = sum(p.numel() for p in model.parameters())
    title = f"Saving {count / 1e6:.0f} million fp32 parameters with AdamW8bit: {size / MIB:.0f} MiB"
    table = Table(title=title, title_justify="left")
    for heading in rows[0]:
        table.add_column(heading, justify="left" if heading == "save" else "right")
    for row in rows:
        table.add_row(*row.values())
    Console().print(table)
    if save:
        print(
            *save_results("checkpoints", title, rows, [f"{rounds} rounds, medians; {torch.get_num_threads()} threads"])
        )


if __name__ == "__main__":
    typer.run(main)
