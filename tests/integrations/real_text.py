"""The same small GPT on the same real text, however it is trained: what the engines' tests compare."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import memopt
from examples.gpt import GPT, GPTConfig, batches, read_text

CONFIG = GPTConfig(layers=3, width=64, heads=4, context=64)
PER_RANK, RANKS = 4, 2
LR = 2e-3
WITHIN = 0.01  # of each step's loss: what the pages promise of states in few bits against torch's AdamW


def model() -> GPT:
    torch.manual_seed(0)
    return GPT(CONFIG)


def data(steps: range, rank: int | None) -> list[tuple[Tensor, Tensor]]:
    """The batches of these steps: a rank's share, or everyone's for None."""
    drawn = batches(read_text(None, limit_bytes=2**17), PER_RANK * RANKS, CONFIG.context, seed=1)
    chosen = [next(drawn) for _ in range(steps.stop)][steps.start :]
    if rank is None:
        return chosen
    return [(x.chunk(RANKS)[rank], y.chunk(RANKS)[rank]) for x, y in chosen]


def planned(zero: int, budget_bytes: int | float) -> Any:
    """A plan for one rank of ``RANKS``; a budget below 1 is a share of the peak that the step has without a plan."""
    from memopt.planner import Degrees, shard

    trace = memopt.trace(model(), data(range(1), 0)[0], optimizer="adamw8bit", device="cpu")
    step = shard(trace, Degrees(data=RANKS, zero=zero))
    budget = int(budget_bytes * step.peak_bytes) if budget_bytes < 1 else int(budget_bytes)
    return memopt.plan(step, budget=budget, hardware="cpu"), budget


def reference(steps: int) -> list[float]:
    """Losses of plain PyTorch in one process: all the data, torch's own AdamW in fp32."""
    built = model()
    optimizer = torch.optim.AdamW(built.parameters(), lr=LR)
    losses = []
    for inputs in data(range(steps), None):
        loss = built(*inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
