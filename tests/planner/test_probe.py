"""``probe`` measures this machine into a hardware description that can be saved and read again."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from memopt.planner import hardware, probe


def test_a_short_probe_gives_plausible_rates(tmp_path: Path) -> None:
    start = time.perf_counter()
    found = probe(seconds=1.0)
    assert time.perf_counter() - start < 30
    assert 1e8 < found.flops_per_second["float32"] < 1e15
    assert 1e8 < found.memory_bytes_per_second < 1e13
    assert 1e6 < found.disk_write_bytes_per_second < 1e11
    assert 1e6 < found.disk_read_bytes_per_second < 1e12
    assert found.compute_efficiency == found.memory_efficiency == found.link_efficiency == 1
    assert found.sustained_memory == found.memory_bytes_per_second
    assert "measured" in found.source
    found.save(tmp_path / "mine.json")
    assert hardware(tmp_path / "mine.json") == found


def test_seconds_must_be_positive() -> None:
    with pytest.raises(ValueError, match="seconds must be positive"):
        probe(0)
