"""Files appear whole or not at all, and a failure names the file that was asked for."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from memopt.files import write_whole
from memopt.planner import Status, hardware


@pytest.mark.parametrize("content", ["größer\n", b"\x00\xff"])
def test_text_and_bytes(tmp_path: Path, content: str | bytes) -> None:
    target = tmp_path / "file"
    target.write_text("before")
    write_whole(target, content)
    assert target.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert list(tmp_path.iterdir()) == [target]


def test_a_full_disk_leaves_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "h100.json"
    hardware("h100").save(target)
    before = target.read_bytes()

    def full(path: Path, content: bytes) -> int:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"No space left on device: '[^']*h100\.json'$"):
        hardware("a100-80").save(target)
    assert target.read_bytes() == before
    assert list(tmp_path.iterdir()) == [target]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere/file'$"):
        write_whole(tmp_path / "nowhere" / "file", "text")


def test_a_status_prints_as_its_value() -> None:
    assert f"{Status.OPTIMAL} {Status.INFEASIBLE!s}" == "optimal infeasible"
