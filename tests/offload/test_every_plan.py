"""Whatever ``memopt.plan`` returns can be applied to the model that it was made for, and does what it says."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import memopt
from examples.gpt import GPT, GPTConfig
from memopt.planner.values import Action
from tests.offload.models import CASES, Case, run, same, step_loss

CLOSE = 0.03
EXACT = ("swap", "recompute")


class Looped(nn.Module):
    """Both blocks are called twice a step: the second calls find the casts of their weights made."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = GPT(GPTConfig(layers=2, width=32, heads=4, context=16, vocabulary=17, dropout=0.1))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.inner.token(tokens) + self.inner.position.weight[: tokens.shape[1]]
        for block in (*self.inner.blocks, *self.inner.blocks):
            x = block(x)
        return F.cross_entropy(self.inner.head(self.inner.norm(x)).flatten(0, -2), targets.flatten())


LOOPED = replace(CASES["gpt-autocast"], make=Looped)
MODELS = {**{name: CASES[name] for name in ("gpt", "resnet", "llama-autocast")}, "looped": LOOPED}


def _peak_bytes(case: Case, model: nn.Module, inputs: tuple[Any, ...]) -> int:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with memopt.meter(model, optimizer) as meter:
        step_loss(case, model, inputs).backward()
        optimizer.step()
        optimizer.zero_grad()
    return meter.peak_bytes


@functools.cache
def _prepared(name: str) -> tuple[Case, nn.Module, dict[str, Tensor], list[Any], list[Any], Any, int]:
    """A model, its state, batches, what a plain run gives, the trace, and the bytes that no plan moves."""
    case = MODELS[name]
    torch.manual_seed(0)
    model = case.make()
    start = {key: value.clone() for key, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    batches = [case.inputs(generator) for _ in range(2)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    traced = memopt.trace(model, batches[0], optimizer=optimizer, autocast=case.autocast)
    fixed = 2 * sum(parameter.nbytes for parameter in model.parameters())
    return case, model, start, batches, run(case, model, batches), traced, fixed


@pytest.mark.parametrize(("actions", "share"), [(EXACT, 0.7), ((*EXACT, "compress"), 0.6), (("compress",), 0.9)])
@pytest.mark.parametrize("name", MODELS)
def test_a_plan_can_be_applied_and_is_true(name: str, actions: tuple[str, ...], share: float) -> None:
    case, model, start, batches, expected, traced, fixed = _prepared(name)
    budget = fixed + int(share * (traced.peak_bytes - fixed))
    plan = memopt.plan(traced, budget, "cpu", actions=actions, time_limit=1)
    if plan.smallest_budget_bytes is not None:
        plan = memopt.plan(traced, plan.smallest_budget_bytes, "cpu", actions=actions, time_limit=1)
    model.load_state_dict(start)
    with memopt.apply(model, plan) as handle:
        ours = run(case, model, batches)
        assert handle.counts.whole == 0, handle.counts.reasons
        assert abs(_peak_bytes(case, model, batches[0]) / plan.peak_bytes - 1) <= CLOSE
    lossy = any(part.action is Action.COMPRESS for block in plan.blocks for part in block.actions)
    assert lossy or actions != ("compress",)
    assert lossy or same(ours, expected)
