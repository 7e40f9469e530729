"""Optimizers whose states or steps are elsewhere: bitwise the optimizer's own steps, wherever the states lie."""

from __future__ import annotations

import copy
import errno
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from memopt.offload import HostOptimizer, PagedOptimizer, SwapError, apply
from memopt.offload.states import host_optimizer, mapped, paged_optimizer
from memopt.optim import AdamW, Lion
from memopt.planner.values import Action
from tests.offload.models import everything, make_plan, same, step_loss
from tests.offload.test_mixtures import _prepared

MAKE: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "torch": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "8bit": lambda p: AdamW(p, lr=1e-2, state="8bit"),
    "4bit": lambda p: Lion(p, lr=1e-3, state="4bit"),
}
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
    case, model, start, batches, _, found = _prepared("gpt", 4)
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


def _full(*args: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "posix_fallocate", _full)
    layer = nn.Linear(30, 30)
    ours = HostOptimizer(layer.parameters(), MAKE["torch"], state="disk", folder=tmp_path, overlap=False)
    layer(torch.randn(2, 30)).sum().backward()
    with pytest.raises(SwapError, match=r"optimizer states: cannot make room for \d+ bytes in .* \(No space left"):
        ours.step()
    ours.close()
    assert list(tmp_path.iterdir()) == []


def test_what_they_cannot_do_is_refused_by_name(tmp_path: Path) -> None:
    layer = nn.Linear(3, 3)
    ours = HostOptimizer(layer.parameters(), MAKE["torch"])
    layer(torch.randn(2, 3)).sum().backward()
    with pytest.raises(RuntimeError, match="overlap=False to accumulate"):
        layer(torch.randn(2, 3)).sum().backward()
    ours.step()
    ours.close()
    with pytest.raises(ValueError, match="no parameter"):
        HostOptimizer([], MAKE["torch"])
    with pytest.raises(ValueError, match="no parameter"):
        PagedOptimizer([], MAKE["torch"])
    with pytest.raises(ValueError, match="state is 'tape'; the states can lie in 'memory' or on 'disk'"):
        HostOptimizer(layer.parameters(), MAKE["torch"], state="tape")
    with pytest.raises(ValueError, match="tier is 'none'; states can wait in"):
        PagedOptimizer(layer.parameters(), MAKE["torch"], tier="none")
    with pytest.raises(ValueError, match=r"state folder .* cannot be used"):
        HostOptimizer(layer.parameters(), MAKE["torch"], state="disk", folder=tmp_path / "none")
    state = PagedOptimizer(layer.parameters(), MAKE["torch"], bucket_bytes=1).state_dict()
    with pytest.raises(ValueError, match="state is for 2 buckets, this optimizer has 1"):
        PagedOptimizer(layer.parameters(), MAKE["torch"]).load_state_dict(state)


class _Refusing(torch.optim.AdamW):
    """Refuses to step while ``refuses``."""

    refuses = False

    def step(self, closure: Any = None) -> Any:
        if self.refuses:
            raise ArithmeticError("no")
        return super().step(closure)


def _refusing(params: Any) -> _Refusing:
    return _Refusing(params, lr=1e-2)


def _three(start: int = 0) -> nn.Sequential:
    torch.manual_seed(start)
    return nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(3)))


def _backward(layers: nn.Module) -> None:
    layers(torch.linspace(-1, 1, 16).view(2, 8)).square().sum().backward()


BUCKET = 8 * 8 * 4
THREE: dict[str, Callable[[Any, Any], Any]] = {
    "host": lambda p, make: HostOptimizer(p, make),
    "host, no overlap": lambda p, make: HostOptimizer(p, make, overlap=False),
    "paged": lambda p, make: PagedOptimizer(p, make, bucket_bytes=BUCKET),
}


@pytest.mark.parametrize("place", THREE)
@pytest.mark.parametrize("apart", [False, True])
def test_a_step_that_fails_is_repeated_for_the_others_only(
    place: str, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``apart``: the host's copies are others than the parameters, as on a device."""
    if apart:
        monkeypatch.setattr(host_optimizer, "_on_host", lambda p: nn.Parameter(p.detach().clone()))
    layers, twin = _three(), _three()
    ours, plain = THREE[place](layers.parameters(), _refusing), _refusing(twin.parameters())
    for n in range(3):
        middle = ours._optimizers[1]
        middle.refuses = n == 1
        for one in (layers, twin):
            _backward(one)
        if n == 1:
            with pytest.raises(ArithmeticError):
                ours.step()
            middle.refuses = False
        ours.step()
        plain.step()
        ours.zero_grad()
        plain.zero_grad()
        assert same(list(layers.parameters()), list(twin.parameters()))
    if hasattr(ours, "close"):
        ours.close()


def test_a_step_is_taken_once_though_its_states_find_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers, twin = _three(), _three()
    ours = HostOptimizer(layers.parameters(), MAKE["torch"], state="disk", folder=tmp_path)
    plain = MAKE["torch"](twin.parameters())
    with monkeypatch.context() as full:
        full.setattr(os, "posix_fallocate", _full)
        for one in (layers, twin):
            _backward(one)
        with pytest.raises(SwapError):
            ours.step()
    ours.step()
    plain.step()
    ours.close()
    assert same(list(layers.parameters()), list(twin.parameters()))


@pytest.mark.parametrize("place", THREE)
@pytest.mark.parametrize("format", ["torch", "8bit"])
def test_a_state_dict_that_does_not_fit_loads_nothing(place: str, format: str) -> None:
    layers, other = _three(), _three(1)
    ours, later = (THREE[place](one.parameters(), MAKE[format]) for one in (layers, other))
    for one, optimizer in ((layers, ours), (other, later)):
        _backward(one)
        optimizer.step()
        optimizer.zero_grad()
    before, wrong = copy.deepcopy(ours.state_dict()), later.state_dict()
    (parts,) = wrong.values()
    key = next(iter(wrong))
    for group in (group for part in parts for group in part["param_groups"]):
        group["lr"] = 0.5
    foreign = {**parts[2], "param_groups": []}
    for damaged, message in (
        (None, "state has no list of"),
        ({}, "state has no list of"),
        ({key: 3}, "state has no list of"),
        ({key: parts[:2]}, r"state is for 2 \w+, this optimizer has 3"),
        ({key: [*parts[:2], foreign]}, "groups"),
    ):
        with pytest.raises(ValueError, match=message):
            ours.load_state_dict(damaged)
        for found, kept in zip(*map(pytree.tree_leaves, (ours.state_dict(), before)), strict=True):
            assert same([found], [kept]) if isinstance(kept, torch.Tensor) else found == kept
        assert 0.5 not in [group["lr"] for group in ours.param_groups]
        if isinstance(ours, PagedOptimizer):
            assert _left(ours) == 0
    if isinstance(ours, HostOptimizer):
        ours.close()
        later.close()


def _left(paged: PagedOptimizer) -> int:
    """States on the device between the steps, without counters."""
    stored = [leaf for o in paged._optimizers for leaf in pytree.tree_leaves(dict(o.state))]
    return sum(leaf.numel() for leaf in stored if isinstance(leaf, torch.Tensor) and leaf.dim() > 0)


def test_a_bucket_does_not_stay_on_the_device_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = _three()
    ours = PagedOptimizer(layers.parameters(), MAKE["torch"], bucket_bytes=BUCKET)
    _backward(layers)
    ours.step()
    with monkeypatch.context() as broken:
        broken.setattr(paged_optimizer, "_on_host", lambda tensor: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            ours.state_dict()
    assert _left(ours) == 0


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
        layers = _three()
        ours = HostOptimizer(layers.parameters(), lambda p: _Slow(p, lr=1e-2), state=state, folder=tmp_path)
        seen: list[Any] = []
        first: Any = None
        for n in range(3):
            _backward(layers)
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


def test_after_a_backward_that_failed_the_next_one_begins() -> None:
    """What had arrived is stepped, the rest is not; ``zero_grad`` ends that step."""
    layers, twin = _three(), _three()
    ours, plain = HostOptimizer(layers.parameters(), MAKE["torch"]), MAKE["torch"](twin.parameters())
    for one in (layers, twin):
        hook = one[1].register_full_backward_hook(lambda *args: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            _backward(one)
        hook.remove()
    plain.step()
    for one, optimizer in ((layers, ours), (twin, plain)):
        optimizer.zero_grad()
        _backward(one)
        optimizer.step()
    ours.close()
    assert same(list(layers.parameters()), list(twin.parameters()))


@pytest.mark.parametrize("place", THREE)
def test_a_closure_runs_forward_and_backward(place: str) -> None:
    layers, twin = _three(), _three()
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


def test_a_state_file_that_another_start_takes_for_a_leftover_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between making a file and locking it, another process may remove it: mapping its name would make another."""
    made, make = [], tempfile.mkstemp

    def mkstemp(**options: Any) -> tuple[int, str]:
        made.append(make(**options))
        if len(made) == 1:
            mapped.remove_leftovers(tmp_path)
        return made[-1]

    monkeypatch.setattr(tempfile, "mkstemp", mkstemp)
    layer = nn.Linear(30, 30, bias=False)
    ours = HostOptimizer(layer.parameters(), MAKE["torch"], state="disk", folder=tmp_path)
    layer(torch.ones(2, 30)).sum().backward()
    ours.step()
    ours.close()
    assert len(made) == 2
    assert list(tmp_path.iterdir()) == []
