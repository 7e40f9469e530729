"""Optimizers whose states or steps are elsewhere: bitwise the optimizer's own steps, wherever the states lie."""

from __future__ import annotations

import copy
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from memopt.offload import HostOptimizer, PagedOptimizer, SwapError, apply
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


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
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
