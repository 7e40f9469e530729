"""Optimizers whose states are elsewhere, in trouble: full disks, failed steps, wrong states; nothing is half done."""

from __future__ import annotations

import copy
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from memopt.offload import HostOptimizer, PagedOptimizer, SwapError
from memopt.offload.states import host_optimizer, mapped, paged_optimizer
from tests.offload.models import same
from tests.offload.optimizer_cases import BUCKET, MAKE, THREE, backward, full_disk, refusing, three


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


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "posix_fallocate", full_disk)
    layer = nn.Linear(30, 30)
    ours = HostOptimizer(layer.parameters(), MAKE["torch"], state="disk", folder=tmp_path, overlap=False)
    layer(torch.randn(2, 30)).sum().backward()
    with pytest.raises(SwapError, match=r"optimizer states: cannot make room for \d+ bytes in .* \(No space left"):
        ours.step()
    ours.close()
    assert list(tmp_path.iterdir()) == []


def test_a_step_is_taken_once_though_its_states_find_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers, twin = three(), three()
    ours = HostOptimizer(layers.parameters(), MAKE["torch"], state="disk", folder=tmp_path)
    plain = MAKE["torch"](twin.parameters())
    with monkeypatch.context() as full:
        full.setattr(os, "posix_fallocate", full_disk)
        for one in (layers, twin):
            backward(one)
        with pytest.raises(SwapError):
            ours.step()
    ours.step()
    plain.step()
    ours.close()
    assert same(list(layers.parameters()), list(twin.parameters()))


@pytest.mark.parametrize("place", THREE)
@pytest.mark.parametrize("apart", [False, True])
def test_a_step_that_fails_is_repeated_for_the_others_only(
    place: str, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``apart``: the host's copies are others than the parameters, as on a device."""
    if apart:
        monkeypatch.setattr(host_optimizer, "_on_host", lambda p: nn.Parameter(p.detach().clone()))
    layers, twin = three(), three()
    ours, plain = THREE[place](layers.parameters(), refusing), refusing(twin.parameters())
    for n in range(3):
        middle = ours._optimizers[1]
        middle.refuses = n == 1
        for one in (layers, twin):
            backward(one)
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


def test_after_a_backward_that_failed_the_next_one_begins() -> None:
    """What had arrived is stepped, the rest is not; ``zero_grad`` ends that step."""
    layers, twin = three(), three()
    ours, plain = HostOptimizer(layers.parameters(), MAKE["torch"]), MAKE["torch"](twin.parameters())
    for one in (layers, twin):
        hook = one[1].register_full_backward_hook(lambda *args: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            backward(one)
        hook.remove()
    plain.step()
    for one, optimizer in ((layers, ours), (twin, plain)):
        optimizer.zero_grad()
        backward(one)
        optimizer.step()
    ours.close()
    assert same(list(layers.parameters()), list(twin.parameters()))


@pytest.mark.parametrize("place", THREE)
@pytest.mark.parametrize("format", ["torch", "8bit"])
def test_a_state_dict_that_does_not_fit_loads_nothing(place: str, format: str) -> None:
    layers, other = three(), three(1)
    ours, later = (THREE[place](one.parameters(), MAKE[format]) for one in (layers, other))
    for one, optimizer in ((layers, ours), (other, later)):
        backward(one)
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
    layers = three()
    ours = PagedOptimizer(layers.parameters(), MAKE["torch"], bucket_bytes=BUCKET)
    backward(layers)
    ours.step()
    with monkeypatch.context() as broken:
        broken.setattr(paged_optimizer, "_on_host", lambda tensor: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            ours.state_dict()
    assert _left(ours) == 0


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
