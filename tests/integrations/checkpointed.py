"""A model and an optimizer to save and load: tied weights, a buffer, extra state, dropout and low-bit states.

And a disk that can be made to wait.
"""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memopt.integrations.checkpoints import writer
from memopt.optim import AdamW8bit


class Tied(nn.Module):
    """Two names for one weight, a buffer that every forward changes, and extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 96)
        self.norm = nn.BatchNorm1d(96)
        self.head = nn.Linear(96, 50, bias=False)
        self.head.weight = self.embed.weight
        self.calls = 0

    def get_extra_state(self) -> int:
        return self.calls

    def set_extra_state(self, state: int) -> None:
        self.calls = state

    def forward(self, tokens: Tensor) -> Tensor:
        self.calls += 1
        x = nn.functional.dropout(self.norm(self.embed(tokens)), 0.1)
        return nn.functional.cross_entropy(self.head(x), tokens)


def made(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Tied()
    return model, AdamW8bit(model.parameters(), lr=1e-2)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        tokens = torch.randint(50, (24,), generator=torch.Generator().manual_seed(step))
        model(tokens).backward()
        optimizer.step()
        optimizer.zero_grad()


def values(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    states = {f"{i}/{k}": v for i, s in optimizer.state_dict()["state"].items() for k, v in s.items()}
    weights = {name: v for name, v in model.state_dict().items() if isinstance(v, Tensor)}
    return {name: torch.as_tensor(value).clone() for name, value in (weights | states).items()}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def hold_writing_back(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """From now on no tensor reaches the disk before the event is set; after a minute that is a failure."""
    go_on, write = threading.Event(), writer.write_part

    def held_back(*args: Any) -> Any:
        assert go_on.wait(60)
        return write(*args)

    monkeypatch.setattr(writer, "write_part", held_back)
    return go_on
