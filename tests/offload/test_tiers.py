"""Swap tiers: what they hold and give back, and what they say when they cannot."""

from __future__ import annotations

import errno
import gc
import os
import signal
import subprocess
import sys
import textwrap
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from memopt.offload import SwapError, apply
from memopt.offload.pinned.pool import PinnedPool
from memopt.offload.states.mapped import MappedStates
from memopt.offload.tiers import open_tier
from memopt.offload.tiers.disk import PREFIX, DiskTier, remove_leftovers
from memopt.planner.values import Action
from tests.offload.models import everything, make_plan, run, same
from tests.offload.prepared import prepared


@pytest.mark.parametrize("name", ["host", "disk"])
@pytest.mark.parametrize("shape", [(0,), (), (1,), (4097,), (33, 65)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.bfloat16, torch.int64])
def test_bytes_come_back(name: str, shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path) -> None:
    tier = open_tier(name, tmp_path)
    x = (torch.randn(shape) * 3).to(dtype)
    slot = tier.put(x)
    assert tier.held_bytes == x.untyped_storage().nbytes()
    assert torch.equal(slot.get().view(dtype).view(shape), x)
    assert torch.equal(slot.get().view(dtype).view(shape), x)
    del slot
    assert tier.held_bytes == 0


def test_extents_are_used_again_and_joined(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, None)
    rng = torch.Generator().manual_seed(0)
    held = {}
    for n in range(300):
        if len(held) > 8:
            slot, x = held.pop(list(held)[int(torch.randint(len(held), (), generator=rng))])
            assert torch.equal(slot.get().view(torch.float32), x)
        x = torch.randn(int(torch.randint(1, 9000, (), generator=rng)))
        held[n] = (tier.put(x), x)
    slot = None
    assert tier._end < 9 * 9000 * 4 * 3
    spaces = sorted([*tier.free_extents(), *((one._offset, one._length) for one, _ in held.values())])
    for (start, length), (following, _) in pairwise(spaces):
        assert start + length == following
    held.clear()
    gc.collect()
    assert tier.free_extents() == [(0, tier._end)]
    assert tier.held_bytes == 0


@pytest.mark.parametrize("name", ["host", "disk"])
def test_the_limit_is_kept_and_named(name: str, tmp_path: Path) -> None:
    tier = open_tier(name, tmp_path, limit_bytes=10_000)
    first = tier.put(torch.zeros(1000))
    with pytest.raises(SwapError, match=f"swap tier {name}: .*limit of 10000 bytes; raise the limit"):
        tier.put(torch.zeros(3000))
    del first
    assert tier.held_bytes == 0
    tier.put(torch.zeros(1000))


def test_a_full_disk_in_the_middle_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, model, start, batches, expected, found = prepared("gpt")
    handle = apply(model, make_plan(case, everything(found, Action.SWAP), "disk"), swap_folder=tmp_path)
    real, count = os.posix_fallocate, 0

    def full(*args: int) -> None:
        nonlocal count
        count += 1
        if count == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*args)

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        SwapError, match=r"swap tier disk: cannot make room for \d+ bytes .*No space left.*free space there"
    ):
        run(case, model, batches)
    gc.collect()
    assert handle.tier.held_bytes == 0
    model.load_state_dict(start)
    model.zero_grad()
    assert same(run(case, model, batches), expected)
    handle.remove()


@pytest.mark.parametrize("failing", ["pwrite", "preadv"])
def test_a_failing_disk(failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, model, _, batches, _, found = prepared("gpt")

    def broken(*args: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, failing, broken)
    says = r"swap tier disk: cannot (read|write) .*Input/output error.*another folder"
    plan = make_plan(case, everything(found, Action.SWAP), "disk")
    with apply(model, plan, swap_folder=tmp_path), pytest.raises(SwapError, match=says):
        run(case, model, batches)


def test_a_truncated_file_is_noticed(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, None)
    slot = tier.put(torch.zeros(5000))
    os.ftruncate(tier._file, 4096)
    with pytest.raises(SwapError, match="ends 15904 bytes early"):
        slot.get()


def test_a_removed_folder_does_not_matter(tmp_path: Path) -> None:
    folder = tmp_path / "swap"
    folder.mkdir()
    tier = DiskTier(folder, None)
    x = torch.randn(100)
    slot = tier.put(x)
    folder.rmdir()
    assert torch.equal(slot.get().view(torch.float32), x)


def test_leftovers_are_removed_but_not_what_is_in_use(tmp_path: Path) -> None:
    import fcntl

    (tmp_path / f"{PREFIX}dead").write_bytes(b"x" * 100)
    (tmp_path / "else").write_bytes(b"y")
    with (tmp_path / f"{PREFIX}alive").open("wb") as alive:
        fcntl.flock(alive, fcntl.LOCK_EX)
        remove_leftovers(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["else", f"{PREFIX}alive"]


@pytest.mark.parametrize("start", [lambda folder: DiskTier(folder, None), MappedStates])
def test_a_start_removes_what_a_crash_has_left(start: Any, tmp_path: Path) -> None:
    """A process that died between making its file and taking the name away."""
    (tmp_path / f"{PREFIX}dead").write_bytes(b"x" * 100)
    begun = start(tmp_path)
    assert list(tmp_path.iterdir()) == []
    del begun


def test_a_killed_run_leaves_nothing(tmp_path: Path) -> None:
    """The file has no name while it is in use; the disk frees it with the process."""
    code = f"""
        import sys, torch
        from memopt.offload.tiers.disk import DiskTier
        from pathlib import Path
        tier = DiskTier(Path({str(tmp_path)!r}), None)
        held = [tier.put(torch.zeros(100_000)) for _ in range(10)]
        print("ready", flush=True)
        while True:
            held.append(tier.put(torch.zeros(1000)))
            held.pop(0)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    DiskTier(tmp_path, None)
    assert list(tmp_path.iterdir()) == []


def test_swapped_storages_are_moved_once_however_many_tensors_share_them(tmp_path: Path) -> None:
    case, model, _, batches, _, found = prepared("gpt", 1)
    with apply(model, make_plan(case, everything(found, Action.SWAP), "disk"), swap_folder=tmp_path) as handle:
        run(case, model, batches)
        sizes = sum(t.sizes[s] for t in found.values() for s in t.saved)
        assert handle.tier.moved_bytes == sizes
        packs = sum(pack.saved >= 0 for t in found.values() for pack in t.packs)
        assert packs > sum(len(t.saved) for t in found.values())


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_nothing_grows_over_many_steps(tier: str, tmp_path: Path) -> None:
    case, model, _, batches, _, found = prepared("gpt", 1)
    from tests.offload.models import mixture

    actions = mixture(found, 1, (Action.KEEP, Action.SWAP, Action.RECOMPUTE))
    with apply(model, make_plan(case, actions, tier), swap_folder=tmp_path) as handle:
        run(case, model, batches * 5)
        gc.collect()
        files = len(os.listdir("/proc/self/fd"))
        objects = len(gc.get_objects())
        end = getattr(handle.tier, "_end", 0)
        gc.disable()
        try:
            run(case, model, batches * 60)
            grown = len(gc.get_objects()) - objects
        finally:
            gc.enable()
        assert handle.tier.held_bytes == 0
        assert len(os.listdir("/proc/self/fd")) == files
        assert getattr(handle.tier, "_end", 0) == end
        assert grown < 60 * 2


def test_pinned_buffers_are_powers_of_two_and_waste_at_most_an_eighth() -> None:
    for size in (0, 1, 2**16, 2**16 + 1, 10**6, 2**20, 2**20 + 1, 7 * 2**20 + 5, 15 * 2**20 + 1, 2**33 + 1):
        lengths = PinnedPool.lengths(size)
        assert all(length.bit_count() == 1 for length in lengths)
        assert 1 <= len(lengths) <= 4
        assert size <= sum(lengths) <= max(2**16, size * 1.125 + 2**16 * (size < 2**20))


def test_pinned_memory_that_the_system_refuses_is_no_lookalike_of_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> torch.Tensor:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(SwapError, match=r"swap tier host: the system did not pin 65536 bytes .*not the GPU's"):
        PinnedPool(None).take(100)
    with pytest.raises(SwapError, match=r"limit of 1000 bytes; raise swap_limit_bytes"):
        PinnedPool(1000).take(100)
    monkeypatch.undo()
    pool = PinnedPool(200_000)
    monkeypatch.setattr(torch, "empty", lambda size, **kwargs: torch.zeros(size, dtype=torch.uint8))
    first, second = pool.take(70_000), pool.take(60_000)
    with pytest.raises(SwapError, match=r"196608 bytes are pinned and 65536 more would exceed the limit of 200000"):
        pool.take(1)
    pool.give(first[0])
    assert pool.take(75_000)[0] is first[0]
    pool.give(second[0])
    with pytest.raises(SwapError, match="more would exceed"):
        pool.take(70_000)
    assert pool.take(60_000)[0].numel() == 65536  # what a failure had taken is back
    assert pool.pinned_bytes <= 200_000
