"""Checkpoint folders that hold other things, that others use at the same time, or that refuse what is asked."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from memopt.integrations.checkpoints import Checkpoints, latest
from tests.distributed.ranks import run_ranks
from tests.integrations.checkpointed import hold_writing_back


def test_what_others_call_a_checkpoint_is_neither_found_nor_deleted_nor_replaced(tmp_path: Path) -> None:
    theirs = tmp_path / "step-000000001"
    theirs.mkdir()
    (theirs / "weights.bin").write_bytes(b"theirs")
    (tmp_path / "step-000000009").write_text("a file")
    (tmp_path / ".step-000000002.replaced").write_text("a file, too")
    model = nn.Linear(2, 2)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert latest(tmp_path) is None
        assert checkpoints.load(model) is None
        for step in (3, 4):
            checkpoints.save(step, model, blocking=True)
        assert checkpoints.steps() == [4]
        for step in (1, 9):
            with pytest.raises(FileExistsError, match=f"step-00000000{step} is there and is no checkpoint"):
                checkpoints.save(step, model)
    left = [".step-000000002.replaced", "step-000000001", "step-000000004", "step-000000009"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    assert (theirs / "weights.bin").read_bytes() == b"theirs"


def test_reading_leaves_a_save_under_way_alone_and_a_second_writer_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = hold_writing_back(monkeypatch)
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    with Checkpoints(tmp_path) as checkpoints:
        saving = checkpoints.save(1, model)
        with Checkpoints(tmp_path) as reader:
            assert reader.load(other) is None
            with pytest.raises(BlockingIOError, match="another run is saving checkpoints to"):
                reader.save(2, other)
            go_on.set()
            saving.wait()
            assert reader.load(other).step == 1
        assert torch.equal(other.weight, model.weight)
        if os.fork() == 0:  # a worker that outlives its parent's interest
            os._exit(0)
    with Checkpoints(tmp_path) as second:
        second.save(2, other, blocking=True)


def test_an_old_checkpoint_that_cannot_be_deleted_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Linear(2, 2)
    rename = Path.rename

    def refused(self: Path, target: Path) -> Path:
        if self.name == "step-000000001":
            raise PermissionError(13, "Permission denied", str(self))
        return rename(self, target)

    with Checkpoints(tmp_path, keep=1) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", refused)
            for step in (1, 2):
                checkpoints.save(step, model, blocking=True)
            assert checkpoints.steps() == [1, 2]
        checkpoints.save(3, model, blocking=True)
        assert checkpoints.steps() == [3]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(FileExistsError, match="run"):
        Checkpoints(tmp_path / "run")
    with pytest.raises(NotADirectoryError, match="run"):
        Checkpoints(tmp_path / "run" / "below")


def _refused(rank: int, folder: str) -> list[str]:
    found = []
    for path in (f"{folder}/file", f"{folder}/run"):
        try:
            Checkpoints(path).save(1, nn.Linear(2, 2))
        except OSError as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def test_every_rank_says_what_is_wrong_with_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    (tmp_path / "run" / "step-000000001").mkdir(parents=True)
    for found in run_ranks(_refused, 2, str(tmp_path)):
        assert [line.partition(":")[0] for line in found] == ["FileExistsError", "FileExistsError"]
        assert "is no checkpoint: move it away" in found[1]


def _refused_contents(rank: int, folder: str) -> list[str]:
    """The second rank's own values cannot be saved; then its file is cut short and no checksum is asked."""
    model, found = nn.Linear(2, 2), []
    with Checkpoints(folder) as checkpoints:
        with pytest.raises(TypeError) as refused:
            checkpoints.save(1, model, extra=Path(folder) if rank else None)
        found.append(str(refused.value))
        path = checkpoints.save(2, model, extra=rank).wait()
        if rank:
            (path / "rank-00001.pt").write_bytes(b"cut")
        with pytest.raises(ValueError, match="damaged") as damaged:
            checkpoints.load(model, verify=False)
        found.append(str(damaged.value))
    return found


def test_what_one_rank_cannot_save_or_load_is_refused_on_all(tmp_path: Path) -> None:
    first, second = run_ranks(_refused_contents, 2, str(tmp_path))
    assert first == second
    assert "plain values" in first[0]
    assert "rank-00001.pt is damaged" in first[1]
