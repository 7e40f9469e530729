"""Checkpoints of one process: bitwise resumes, saves that overlap with training, and failures that cost nothing."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from examples.gpt import GPT, GPTConfig
from memopt.integrations.checkpoints import Checkpoints, folders, latest, staging
from memopt.optim import AdamW, AdamW8bit, BlockCoordinate
from tests.integrations.checkpointed import assert_same, hold_writing_back, made, train, values

CONFIG = GPTConfig(layers=2, width=64, heads=2, context=16, vocabulary=64, dropout=0.1)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path: Path, overlap: bool) -> None:
    model, optimizer = made()
    with Checkpoints(tmp_path, overlap=overlap) as checkpoints:
        train(model, optimizer, range(3))
        checkpoints.save(3, model, optimizer, extra={"seen": 3})
        train(model, optimizer, range(3, 6))
    again, restored = made(seed=1)
    loaded = Checkpoints(tmp_path).load(again, restored)
    assert (loaded.step, loaded.extra) == (3, {"seen": 3})
    train(again, restored, range(3, 6))
    assert_same(values(again, restored), values(model, optimizer))
    assert again.calls == model.calls == 6


@pytest.mark.parametrize("overlap", [False, True])
def test_training_goes_on_while_a_save_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    """Writing cannot begin before the steps after the save are done; what is written is what there was before them."""
    go_on = hold_writing_back(monkeypatch)
    model, optimizer = made()
    train(model, optimizer, range(2))
    with Checkpoints(tmp_path, overlap=overlap) as checkpoints:
        before = values(model, optimizer)
        saving = checkpoints.save(2, model, optimizer)
        train(model, optimizer, range(2, 4))
        assert not saving.done()
        assert latest(tmp_path) is None
        go_on.set()
        assert saving.wait() == latest(tmp_path)
        assert checkpoints.save(4, model, optimizer, blocking=True).done()
    again, restored = made(seed=1)
    Checkpoints(tmp_path).load(again, restored, step=2)
    assert_same(values(again, restored), before)


def test_a_step_waits_for_the_copies_that_overlap_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = made()
    train(model, optimizer, range(2))
    model(torch.arange(24)).backward()
    before, copy, may_copy = values(model, optimizer), staging.HostCopies._copy, threading.Event()

    def held_back(self: staging.HostCopies, name: str, tensor: Tensor) -> staging.Part:
        if name in self.later:
            may_copy.wait(60)
        return copy(self, name, tensor)

    monkeypatch.setattr(staging.HostCopies, "_copy", held_back)
    with Checkpoints(tmp_path, overlap=True) as checkpoints:
        checkpoints.save(2, model, optimizer)
        threading.Timer(0.2, may_copy.set).start()
        optimizer.step()
        assert may_copy.is_set()
    again, restored = made(seed=1)
    Checkpoints(tmp_path).load(again, restored)
    assert_same(values(again, restored), before)


def test_host_copies_are_made_once(tmp_path: Path) -> None:
    model, optimizer = made()
    train(model, optimizer, range(1))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, model, optimizer)
        held = {name: buffer.data_ptr() for name, buffer in checkpoints._copies._buffers.items()}
        checkpoints.save(2, model, optimizer)
        assert {name: buffer.data_ptr() for name, buffer in checkpoints._copies._buffers.items()} == held


def test_weights_are_what_any_safetensors_reader_reads(tmp_path: Path) -> None:
    model, _ = made()
    with Checkpoints(tmp_path) as checkpoints:
        path = checkpoints.save(7, model.to(torch.bfloat16)).wait()
    assert path == tmp_path / "step-000000007"
    read = load_file(path / "model.safetensors")
    assert "head.weight" not in read  # tied to the embedding, saved once
    assert_same(read, {n: v for n, v in model.state_dict().items() if n in read})
    assert len(read) == len(list(model.state_dict())) - 2  # without the tied name and the extra state


@pytest.mark.parametrize("make", [torch.optim.AdamW, BlockCoordinate, AdamW], ids=lambda make: make.__name__)
def test_any_optimizer(tmp_path: Path, make: Any) -> None:
    def built() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = GPT(CONFIG)
        if make is BlockCoordinate:
            return model, BlockCoordinate(model, AdamW8bit, switch_every=2, lr=1e-3)
        return model, make(model.parameters(), lr=1e-3)

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, chosen: range) -> None:
        for step in chosen:
            tokens = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(step))
            model(tokens, tokens).backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = built()
    steps(model, optimizer, range(3))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, model, optimizer)
        steps(model, optimizer, range(3, 6))
        again, restored = built()
        checkpoints.load(again, restored)
    steps(again, restored, range(3, 6))
    assert_same(dict(again.named_parameters()), dict(model.named_parameters()))


def test_only_the_newest_are_kept_and_a_step_saved_again_is_replaced(tmp_path: Path) -> None:
    model, optimizer = made()
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.load(model, optimizer) is None
        for step in (1, 2, 10, 10):
            train(model, optimizer, range(step, step + 1))
            checkpoints.save(step, model, optimizer, extra=step)
        checkpoints.wait()
        assert checkpoints.steps() == [2, 10]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000002", "step-000000010"]
        before = values(model, optimizer)
        assert checkpoints.load(model, optimizer).extra == 10
        assert_same(values(model, optimizer), before)


def test_a_full_disk_costs_only_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = made()
    train(model, optimizer, range(1))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, model, optimizer, blocking=True)
    before = values(model, optimizer)

    def full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        saving = checkpoints.save(2, model, optimizer)
        with pytest.raises(RuntimeError, match="step 2 could not be written") as caught:
            saving.wait()
    assert "No space left" in str(caught.value.__cause__)
    assert_same(values(model, optimizer), before)
    assert checkpoints.steps() == [1]
    with pytest.raises(RuntimeError, match="step 2"):
        checkpoints.save(3, model, optimizer)  # a failure nobody looked at is not lost
    assert checkpoints.save(3, model, optimizer).wait() == latest(tmp_path)


@pytest.mark.parametrize("renames", range(5))
def test_a_kill_between_any_two_renames_leaves_complete_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    """Replacing step 2 and deleting step 1 takes three renames; the process may die before each of them."""
    model, optimizer = made()
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.keep = 3
    for step in (1, 2):
        checkpoints.save(step, model, optimizer, extra="old", blocking=True)
    checkpoints.keep = 1
    rename, left = Path.rename, iter(range(renames))

    def until_killed(self: Path, target: Path) -> Path:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", until_killed)
        saving = checkpoints.save(2, model, optimizer, extra="new")
        if renames < 3:
            with pytest.raises(BaseException):  # noqa: B017, PT011  # whatever the engine makes of it
                saving.wait()
            checkpoints._saving = None
        else:
            saving.wait()
    checkpoints._lock.release()  # as the system does
    after = Checkpoints(tmp_path)
    assert after.steps() == ([1, 2] if renames < 3 else [2])
    assert after.load(model, optimizer).extra == ("old" if renames < 2 else "new")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    after.close()


def test_leftovers_of_others_stay(tmp_path: Path) -> None:
    for name in (".git", "notes", ".step-000000003.partial", ".step-4.partial"):
        (tmp_path / name).mkdir()
    Checkpoints(tmp_path).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".git", ".step-4.partial", "notes"]
    assert folders.steps(tmp_path) == []
    assert folders.steps(tmp_path / "nowhere") == []


def test_what_cannot_be_loaded_without_running_code_is_not_saved(tmp_path: Path) -> None:
    model, optimizer = made()
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(TypeError, match="plain values"):
            checkpoints.save(1, model, optimizer, extra={"thing": CONFIG})
        with pytest.raises(ValueError, match="step=-1"):
            checkpoints.save(-1, model, optimizer)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="keep=0"):
        Checkpoints(tmp_path, keep=0)


def test_another_model_or_optimizer_is_refused_by_name(tmp_path: Path) -> None:
    model, optimizer = made()
    train(model, optimizer, range(1))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, model, optimizer)
        other = GPT(CONFIG)
        with pytest.raises(ValueError, match=r"nothing loaded: no weight 'blocks\.0\.att.*and \d+ more"):
            checkpoints.load(other)
        before = values(model, optimizer)
        with pytest.raises(ValueError, match="nothing loaded"):
            checkpoints.load(model, AdamW(model.parameters(), state="4bit"))
        assert_same(values(model, optimizer), before)
        with pytest.raises(FileNotFoundError, match=r"step 5; it has \[1\]"):
            checkpoints.load(model, step=5)
