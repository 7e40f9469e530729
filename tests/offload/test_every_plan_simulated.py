"""What the simulation says of a plan is what a meter shows when the plan is carried out, whatever the plan does."""

from __future__ import annotations

import functools
import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import memopt
from memopt.offload import apply
from memopt.planner.compression import formats_for
from memopt.planner.devices import rates_of
from memopt.planner.problem import is_steady, movable_inputs
from memopt.planner.validation import simulate
from memopt.planner.values import Action, BlockPlan, SavedStorage, StorageAction, Trace
from tests.offload.models import CASES, Case, step_loss

CLOSE = 0.01
"""Of the peak. What the simulation leaves out are whole small storages (a running statistic copied a second time, a
bias's cast): in these models at most some hundred bytes of 20 thousand or more."""

EVERYTHING = (Action.KEEP, Action.SWAP, Action.RECOMPUTE, Action.COMPRESS)


class Gate(nn.Module):
    """Writes to a clone in place, with its old value saved, beside views of one product."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide, self.out = nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.wide(x).chunk(2, -1)
        z = left.clone()
        z.mul_(right.sigmoid())
        return x + self.out(F.silu(z) * right)


class Gates(nn.Module):
    """Blocks called twice a step, inside modules of their own, whose outputs are summed in the end."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Sequential(nn.LayerNorm(16), Gate(16)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for part in (*self.parts, *self.parts):
            x = part(x)
            outputs.append(x)
        return torch.stack([y.square().mean() for y in outputs]).sum()


class Norms(nn.Module):
    """Convolutions and group norms in place: under autocast the CPU's norms take 16 bits with weights of 32."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.parts = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(inplace=True)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for part in self.parts:
            x = x + part(x)
        return x.square().mean()


GATES = Case(Gates, lambda g: (torch.randn(4, 24, 16, generator=g),), (), autocast=torch.bfloat16)
NORMS = Case(Norms, lambda g: (torch.randn(4, 3, 12, 12, generator=g),), (), autocast=torch.bfloat16)
MODELS = {
    **{name: CASES[name] for name in ("gpt", "resnet", "views", "llama-autocast", "t5", "twice")},
    "resnet-autocast": replace(CASES["resnet"], autocast=torch.bfloat16),
    "gates-autocast": GATES,
    "norms-autocast": NORMS,
}
ACCUMULATED = ("twice", "gates-autocast")


@functools.cache
def _prepared(name: str, passes: int) -> tuple[Case, nn.Module, tuple[Any, ...], torch.optim.Optimizer, Trace]:
    case = MODELS[name]
    torch.manual_seed(0)
    model = case.make()
    inputs = case.inputs(torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    traced = memopt.trace(model, inputs, optimizer=optimizer, autocast=case.autocast, accumulate=passes)
    return case, model, inputs, optimizer, traced


def _drawn(draw: random.Random, saved: SavedStorage, actions: tuple[Action, ...]) -> tuple[StorageAction, ...]:
    """A random fate: sometimes a swap of a share only, sometimes 8 bits and sometimes 4."""
    action, formats = draw.choice(actions), formats_for(saved.dtype)
    if action is Action.COMPRESS:
        # Whether a float can be a mask shows in its values only.
        formats = [name for name in formats if name != "mask" or saved.dtype == "bool"]
        return (StorageAction(saved.index, saved.bytes, action, 1.0, draw.choice(formats)),) if formats else (
            StorageAction(saved.index, saved.bytes, Action.KEEP),
        )  # fmt: skip
    if action is Action.SWAP and draw.random() < 0.3:
        share = draw.choice((0.25, 0.5, 0.75))
        return (
            StorageAction(saved.index, saved.bytes, action, share),
            StorageAction(saved.index, saved.bytes, Action.KEEP, 1 - share),
        )
    return (StorageAction(saved.index, saved.bytes, action),)


def _plans(traced: Trace, seed: int) -> tuple[BlockPlan, ...]:
    """Random fates for what a plan may move; the calls of every pass run under one plan."""
    draw = random.Random(seed)
    actions = tuple(draw.sample(EVERYTHING, draw.choice((2, 3, 4))))
    shared = [s.storage for block in traced.blocks for s in (*block.saved, *block.saved_inputs)]
    born = {storage.id: storage.birth for storage in traced.storages}
    found: dict[tuple[str, int], BlockPlan] = {}
    for block, given in zip(traced.blocks, movable_inputs(traced), strict=True):
        if (block.path, block.call) in found or not is_steady(traced, block):
            continue
        own = [
            part
            for s in block.saved
            for part in (
                _drawn(draw, s, actions)
                if shared.count(s.storage) == 1 and born[s.storage] >= block.forward[0]
                else (StorageAction(s.index, s.bytes, Action.KEEP),)
            )
        ]
        inputs = [StorageAction(s.index, s.bytes, Action.SWAP) for s in given if draw.random() < 0.3]
        found[block.path, block.call] = BlockPlan(block.path, block.call, block.signature, tuple(own), tuple(inputs))
    return tuple(found.values())


def _step(case: Case, model: nn.Module, inputs: tuple[Any, ...], optimizer: torch.optim.Optimizer, passes: int) -> None:
    for _ in range(passes):
        step_loss(case, model, inputs).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize(("name", "passes"), [*((name, 1) for name in MODELS), *((name, 2) for name in ACCUMULATED)])
def test_the_simulated_peak_is_the_metered_one(name: str, passes: int) -> None:
    case, model, inputs, optimizer, traced = _prepared(name, passes)
    for seed in range(2):
        plans = _plans(traced, seed)
        played = simulate(traced, plans, rates_of("cpu", traced.dtype))
        assert played.broken is None
        with apply(model, SimpleNamespace(blocks=plans, swap_tier="disk")) as handle:
            _step(case, model, inputs, optimizer, passes)
            with memopt.meter(model, optimizer) as meter:
                _step(case, model, inputs, optimizer, passes)
        assert handle.counts.whole == 0, handle.counts.reasons
        assert meter.peak_bytes == pytest.approx(played.peak_bytes, rel=CLOSE), (seed, played.peak_at)
