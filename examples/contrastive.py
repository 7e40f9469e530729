"""Contrastive training with a large batch: the first and second half of every line of source code find each other.

The loss compares every half with every other in the batch. Its similarities, N x N of them, are the memory of a large
batch; ``memopt.contrastive_loss`` makes them a chunk of rows at a time.

Run as ``python -m examples.contrastive --steps 30``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import memopt
from examples.gpt import read_text
from memopt.optim import AdamW8bit

HALF = 24  # bytes


class Tower(nn.Module):
    """Bytes (N, HALF) to directions (N, width), from pairs of neighbouring bytes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pairs = nn.EmbeddingBag(4096, width, mode="mean")
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, text: Tensor) -> Tensor:
        x = self.pairs((text[:, :-1] * 31 + text[:, 1:]) % 4096)
        return F.normalize(x + self.down(F.gelu(self.up(x))), dim=-1)


class TwoTowers(nn.Module):
    """One tower for both halves, and the learned temperature."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.tower = Tower(width)
        self.log_scale = nn.Parameter(torch.tensor(2.5))

    def forward(self, lines: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.tower(lines[:, :HALF]), self.tower(lines[:, HALF:]), self.log_scale.exp()


def plain_loss(queries: Tensor, keys: Tensor, *, logit_scale: Tensor) -> Tensor:
    """The loss as it is usually written."""
    similarity = logit_scale * queries @ keys.t()
    own = torch.arange(len(queries))
    return (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.t(), own)) / 2


def lines(text: Tensor) -> Tensor:
    """(N, 2 * HALF): the lines that are long enough, cut; each once."""
    long = [line.strip()[: 2 * HALF] for line in bytes(text.tolist()).split(b"\n") if len(line.strip()) >= 2 * HALF]
    kept = list(dict.fromkeys(long))
    return torch.frombuffer(bytearray(b"".join(kept)), dtype=torch.uint8).view(-1, 2 * HALF).long()


def batches(data: Tensor, size: int) -> Iterator[Tensor]:
    draw = torch.Generator().manual_seed(0)
    while True:
        yield data[torch.randperm(len(data), generator=draw)[:size]]


def train(loss_fn: Callable[..., Tensor], data: Tensor, steps: int, batch: int, width: int) -> tuple[float, float, int]:
    """Loss of the last step, share of halves that find their other half in a batch, metered peak in bytes."""
    torch.manual_seed(0)
    model = TwoTowers(width)
    optimizer = AdamW8bit(model.parameters(), lr=5e-3)
    source = batches(data, batch)
    for _ in range(steps):
        with memopt.meter(model, optimizer) as metered:
            queries, keys, scale = model(next(source))
            loss = loss_fn(queries, keys, logit_scale=scale)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        queries, keys, _ = model(next(source))
        right = ((queries @ keys.t()).argmax(1) == torch.arange(batch)).float().mean().item()
    return loss.item(), right, metered.peak_bytes


def main(
    steps: Annotated[int, typer.Option(min=2, help="Training steps.")] = 30,
    batch: Annotated[int, typer.Option(min=2, help="Pairs in a batch.")] = 2048,
    width: Annotated[int, typer.Option(min=4, help="Width of the towers.")] = 64,
    limit: Annotated[int, typer.Option(min=4096, help="Bytes of source code to read.")] = 2**22,
) -> None:
    """Train the same two towers with the plain contrastive loss and with memopt's."""
    data = lines(read_text(None, limit))
    batch = min(batch, len(data))
    table = Table(title=f"{batch} pairs a step, {steps} steps", title_justify="left")
    for heading in ("", "loss", "found", "peak of a step"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, loss_fn in (("plain", plain_loss), ("memopt.contrastive_loss", chunked)):
        loss, right, peak = train(loss_fn, data, steps, batch, width)
        table.add_row(name, f"{loss:.4f}", f"{right:.1%}", f"{peak / 2**20:.2f} MiB")
    Console().print(table)


def chunked(queries: Tensor, keys: Tensor, *, logit_scale: Tensor) -> Tensor:
    """The same without the matrix: 1 MiB of similarities at a time."""
    return memopt.contrastive_loss(queries, keys, logit_scale=logit_scale, chunk_bytes=2**20)


if __name__ == "__main__":
    typer.run(main)
