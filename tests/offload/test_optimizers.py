"""Optimizers whose states or steps are elsewhere: bitwise the optimizer's own steps, wherever the states lie."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from memopt.offload import HostOptimizer, PagedOptimizer, apply
from memopt.planner.values import Action
from tests.offload.models import everything, make_plan, same, step_loss
from tests.offload.optimizer_cases import MAKE, THREE, backward, three
from tests.offload.prepared import prepared

PLACES: dict[str, Callable[[Any, Any, Path], Any]] = {
    "host": lambda p, make, folder: HostOptimizer(p, make),
    "host, no overlap": lambda p, make, folder: HostOptimizer(p, make, overlap=False),
    "mapped": lambda p, make, folder: HostOptimizer(p, make, state="disk", folder=folder),
    "paged": lambda p, make, folder: PagedOptimizer(p, make, bucket_bytes=10_000),
    "paged to disk": lambda p, make, folder: PagedOptimizer(p, make, bucket_bytes=10_000, tier="disk", folder=folder),
}


def _train(model: nn.Module, optimizer: Any, case: Any, batches: Any, reload: Callable[[Any], Any] | None) -> Any:
    torch.manual_seed(4)
    for n, inputs in enumerate(batches):
        step_loss(case, model, inputs).backward()
        optimizer.step()
        optimizer.zero_grad()
        if n == 1 and reload is not None:
            state = optimizer.state_dict()
            if hasattr(optimizer, "close"):
                optimizer.close()
            optimizer = reload(model)
            optimizer.load_state_dict(state)
    return optimizer


@pytest.mark.parametrize("format", MAKE)
def test_every_place_is_bitwise_the_optimizers_own_step(format: str, tmp_path: Path) -> None:
    """Saved and loaded into a fresh one in the middle; under a plan whose blocks replay while others are stepped."""
    case, model, start, batches, _, found = prepared("gpt", 4)
    twin = copy.deepcopy(model)
    _train(twin, MAKE[format](twin.parameters()), case, batches, None)
    for place, make in PLACES.items():
        model.load_state_dict(start)

        def fresh(module: nn.Module, make: Any = make) -> Any:
            return make(module.parameters(), MAKE[format], tmp_path)

        with apply(model, make_plan(case, everything(found, Action.RECOMPUTE))) as handle:
            last = _train(model, fresh(model), case, batches, fresh)
            assert handle.counts.whole == 0
        assert same(list(model.parameters()), list(twin.parameters())), place
        if hasattr(last, "close"):
            last.close()
        assert list(tmp_path.iterdir()) == [], place


def test_states_are_where_they_should_be(tmp_path: Path) -> None:
    layers = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
    bytes_ = sum(p.nbytes for p in layers.parameters()) * 2

    def step(optimizer: Any) -> None:
        layers(torch.randn(2, 64)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    mapped = HostOptimizer(layers.parameters(), MAKE["torch"], state="disk", folder=tmp_path)
    for _ in range(2):
        step(mapped)
        assert bytes_ <= mapped._mapped.mapped_bytes <= bytes_ + 64 * 12
        moments = [t for o in mapped._optimizers for s in o.state.values() for t in s.values() if t.dim()]
        assert len(moments) == 12
        assert all(t.is_shared() for t in moments)
    assert mapped.state_bytes() == bytes_ + 6 * 4  # and six counters
    mapped.close()

    paged = PagedOptimizer(layers.parameters(), MAKE["torch"], bucket_bytes=64 * 65 * 4, tier="disk", folder=tmp_path)
    assert len(paged._optimizers) == 3
    seen = []
    paged._optimizers[1].register_step_pre_hook(lambda *args: seen.append(paged.tier.held_bytes))
    for _ in range(2):
        step(paged)
        assert paged.tier.held_bytes == bytes_
    # In the second step the second bucket is on the device and nothing else.
    assert seen == [bytes_ // 3, bytes_ - bytes_ // 3]


class _Slow(torch.optim.AdamW):
    """Takes so long over a step that whatever does not wait for it comes first."""

    def step(self, closure: Any = None) -> Any:
        time.sleep(0.01)
        return super().step(closure)


def _half_rate(optimizer: HostOptimizer) -> None:
    for group in optimizer.param_groups:
        group["lr"] /= 2


MEANWHILE: dict[str, Callable[[HostOptimizer, Any], Any]] = {
    "state_dict": lambda optimizer, state: copy.deepcopy(optimizer.state_dict()),
    "load_state_dict": lambda optimizer, state: optimizer.load_state_dict(copy.deepcopy(state)),
    "zero_grad": lambda optimizer, state: optimizer.zero_grad(),
    "zero_grad in place": lambda optimizer, state: optimizer.zero_grad(set_to_none=False),
    "param_groups": lambda optimizer, state: _half_rate(optimizer),
    "state_bytes": lambda optimizer, state: optimizer.state_bytes(),
}


@pytest.mark.parametrize("name", MEANWHILE)
@pytest.mark.parametrize("state", ["memory", "disk"])
def test_between_backward_and_step_steps_under_way_are_waited_for(name: str, state: str, tmp_path: Path) -> None:
    def train(settled: bool) -> list[Any]:
        layers = three()
        ours = HostOptimizer(layers.parameters(), lambda p: _Slow(p, lr=1e-2), state=state, folder=tmp_path)
        seen: list[Any] = []
        first: Any = None
        for n in range(3):
            backward(layers)
            if n == 1 and settled:
                wait(ours._pending.values())
            if n == 1:
                seen += pytree.tree_leaves(MEANWHILE[name](ours, first))
                seen += [p.grad for p in layers.parameters()]
            ours.step()
            if n == 0:
                first = copy.deepcopy(ours.state_dict())
            ours.zero_grad()
        seen += pytree.tree_leaves((list(layers.parameters()), ours.state_dict()))
        ours.close()
        return seen

    for found, expected in zip(train(False), train(True), strict=True):
        assert torch.equal(found, expected) if isinstance(expected, torch.Tensor) else found == expected


@pytest.mark.parametrize("place", THREE)
def test_a_closure_runs_forward_and_backward(place: str) -> None:
    layers, twin = three(), three()
    ours, plain = THREE[place](layers.parameters(), MAKE["torch"]), MAKE["torch"](twin.parameters())

    def closure(module: nn.Module, optimizer: Any) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            optimizer.zero_grad()
            loss: torch.Tensor = module(torch.ones(2, 8)).square().sum()
            loss.backward()
            return loss

        return run

    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(ours.step(closure(layers, ours)), plain.step(closure(twin, plain)))
    if isinstance(ours, HostOptimizer):
        ours.close()
    assert same(list(layers.parameters()), list(twin.parameters()))
