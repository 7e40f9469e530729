"""Optimizers to keep elsewhere, three layers for them to train, and what can go wrong on the way."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from memopt.offload import HostOptimizer, PagedOptimizer
from memopt.optim import AdamW, Lion

MAKE: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "torch": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "8bit": lambda p: AdamW(p, lr=1e-2, state="8bit"),
    "4bit": lambda p: Lion(p, lr=1e-3, state="4bit"),
}
BUCKET = 8 * 8 * 4
THREE: dict[str, Callable[[Any, Any], Any]] = {
    "host": lambda p, make: HostOptimizer(p, make),
    "host, no overlap": lambda p, make: HostOptimizer(p, make, overlap=False),
    "paged": lambda p, make: PagedOptimizer(p, make, bucket_bytes=BUCKET),
}


def three(start: int = 0) -> nn.Sequential:
    torch.manual_seed(start)
    return nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(3)))


def backward(layers: nn.Module) -> None:
    layers(torch.linspace(-1, 1, 16).view(2, 8)).square().sum().backward()


class Refusing(torch.optim.AdamW):
    """Refuses to step while ``refuses``."""

    refuses = False

    def step(self, closure: Any = None) -> Any:
        if self.refuses:
            raise ArithmeticError("no")
        return super().step(closure)


def refusing(params: Any) -> Refusing:
    return Refusing(params, lr=1e-2)


def full_disk(*args: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
