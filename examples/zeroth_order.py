"""Fine-tune with forward passes only: MeZO and its variants beside backpropagation, on lines of Python's own source.

A network has learned, with gradients, to tell comment lines from all others. Then its task changes: lines of docstrings
count as comments as well. It learns that without a backward pass, without gradients and without saved activations.

Run as ``python -m examples.zeroth_order --steps 300``.
"""

from __future__ import annotations

import io
import sysconfig
import tokenize
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import memopt
from memopt.optim import AdamW8bit, ZerothOrder

BYTES = 64  # of a line that are read
CODE, COMMENT, DOCSTRING = range(3)
VARIANTS: dict[str, dict[str, Any]] = {
    "MeZO": {"rule": "sgd", "lr": 5e-3},
    "MeZO by blocks": {"rule": "sgd", "lr": 6e-3, "blocks": "auto"},
    "Adam, 8 bits": {"rule": "adamw8bit", "lr": 1e-3, "samples": 2},
}


def lines(limit: int) -> tuple[Tensor, Tensor]:
    """The first bytes of lines of the standard library, (N, BYTES), and what they are, (N,): as many of each kind."""
    found: list[list[bytes]] = [[], [], []]
    for source in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text = source.read_text(encoding="utf-8", errors="replace")
        kinds: dict[int, int] = {}
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.STRING and token.string.endswith('"""'):
                kinds |= dict.fromkeys(range(token.start[0], token.end[0] + 1), DOCSTRING)
            elif token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):
                kinds[token.start[0]] = COMMENT
        for number, line in enumerate(text.splitlines(), 1):
            if len(line.strip()) > 8:
                found[kinds.get(number, CODE)].append(line.strip().encode()[:BYTES].ljust(BYTES))
        if min(map(len, found)) >= limit:
            break
    data = b"".join(line for kind in found for line in kind[:limit])
    labels = torch.tensor([kind for kind, some in enumerate(found) for _ in some[:limit]])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, BYTES)[order].long(), labels[order]


class Reader(nn.Module):
    """Bytes of a line (N, BYTES) to two logits: is it a comment?"""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.layers = nn.ModuleList(nn.Conv1d(width, width, 5, padding=2) for _ in range(3))
        self.head = nn.Linear(width, 2)

    def forward(self, line: Tensor) -> Tensor:
        x = self.embed(line).transpose(1, 2)
        for layer in self.layers:
            x = x + F.gelu(layer(x))
        return self.head(x.mean(-1))


def train(model: nn.Module, step: Callable[[Tensor, Tensor], Any], x: Tensor, y: Tensor, steps: int, batch: int) -> int:
    """Runs ``step`` on random batches; returns the most bytes that one of its first steps had alive."""
    draw = torch.Generator().manual_seed(1)
    peak = 0
    for number in range(steps):
        chosen = torch.randint(len(y), (batch,), generator=draw)
        if number in (1, 2):
            with memopt.meter(model, []) as metered:
                step(x[chosen], y[chosen])
            peak = max(peak, metered.peak_bytes)
        else:
            step(x[chosen], y[chosen])
    return peak


def with_gradients(model: nn.Module, lr: float) -> Callable[[Tensor, Tensor], Any]:
    """One ordinary training step."""
    optimizer = AdamW8bit(model.parameters(), lr=lr)

    def step(x: Tensor, y: Tensor) -> None:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def forward_only(model: nn.Module, options: dict[str, Any]) -> Callable[[Tensor, Tensor], Any]:
    """One step of :class:`memopt.optim.ZerothOrder`."""
    optimizer = ZerothOrder(model, **options)
    return lambda x, y: optimizer.step(lambda: F.cross_entropy(model(x), y))


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return (model(x).argmax(-1) == y).float().mean().item()


def main(
    steps: Annotated[int, typer.Option(min=3, help="Steps of each variant.")] = 300,
    learned: Annotated[int, typer.Option(min=3, help="Steps with gradients before the task changes.")] = 100,
    batch: Annotated[int, typer.Option(min=1, help="Lines in a batch.")] = 64,
    width: Annotated[int, typer.Option(min=4, help="Width of the network.")] = 16,
    limit: Annotated[int, typer.Option(min=16, help="Lines of each kind.")] = 1000,
) -> None:
    """Compare the zeroth-order variants with backpropagation."""
    x, kinds = lines(limit)
    before, after = (kinds == COMMENT).long(), (kinds != CODE).long()
    held = len(x) // 5
    torch.manual_seed(0)
    model = Reader(width)
    train(model, with_gradients(model, 3e-3), x[held:], before[held:], learned, batch)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    table = Table(title=f"A new task for {sum(p.numel() for p in model.parameters())} parameters", title_justify="left")
    for heading in ("", "right before", "right after", "peak of a step"):
        table.add_column(heading, justify="right" if heading else "left")
    ways = {name: lambda o=options: forward_only(model, o) for name, options in VARIANTS.items()}
    ways["with gradients, AdamW"] = lambda: with_gradients(model, 1e-3)
    for name, make in ways.items():
        model.load_state_dict(start)
        first = accuracy(model, x[:held], after[:held])
        peak = train(model, make(), x[held:], after[held:], steps, batch)
        right = accuracy(model, x[:held], after[:held])
        table.add_row(name, f"{first:.1%}", f"{right:.1%}", f"{peak / 2**20:.2f} MiB")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
