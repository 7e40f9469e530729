"""A run killed at random moments resumes bitwise; ``python -m tests.faults.killed 30`` does it thirty times."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from memopt.integrations.checkpoints import Checkpoints
from tests.integrations.checkpointed import made, train


def test_killed_runs_resume_bitwise() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.killed", "8"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    *kills, total = done.stdout.splitlines()
    assert len(kills) == 8
    assert int(total.split("; ")[1].split()[0]) > 0


def test_what_has_a_name_survives_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill loses nothing that was written; a power cut may, unless it was synced: all of it before the rename."""
    events: list[tuple[str, Path]] = []
    fsync, pwrite, rename = os.fsync, os.pwrite, Path.rename

    def of(descriptor: int) -> Path:
        return Path(os.readlink(f"/proc/self/fd/{descriptor}"))

    def synced(descriptor: int) -> None:
        events.append(("sync", of(descriptor)))
        fsync(descriptor)

    def wrote(descriptor: int, *arguments: Any) -> int:
        events.append(("write", of(descriptor)))
        return pwrite(descriptor, *arguments)

    def renamed(self: Path, target: Path) -> Path:
        events.append(("rename", self))
        return rename(self, target)

    model, optimizer = made()
    train(model, optimizer, range(1))
    with Checkpoints(tmp_path) as checkpoints, monkeypatch.context() as patch:
        patch.setattr(os, "fsync", synced)
        patch.setattr(os, "pwrite", wrote)
        patch.setattr(Path, "rename", renamed)
        path = checkpoints.save(1, model, optimizer, blocking=True).path
    partial = tmp_path / ".step-000000001.partial"
    named = events.index(("rename", partial))
    files = [partial / file.name for file in path.iterdir()]
    assert len(files) == 4
    for file in files:
        last_write = max((n for n, event in enumerate(events) if event == ("write", file)), default=-1)
        assert last_write < events.index(("sync", file)) < events.index(("sync", partial)) < named
    assert ("sync", tmp_path) in events[named:]
