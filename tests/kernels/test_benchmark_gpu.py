"""The GPU benchmark walks through all its cases on the CPU at tiny sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import gpu


def test_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMOPT_KERNELS", "torch")  # other tests compile and compare; here it is the walk that counts
    assert gpu.main(["--dry-run", "--out", str(tmp_path)]) == 0
    (report,) = tmp_path.glob("gpu-*-dry-run.json")
    (table,) = tmp_path.glob("gpu-*-dry-run.md")
    cases = json.loads(report.read_text())["cases"]
    assert len(cases) > 30
    assert all(case["parity"] == "ok" and case["seconds"] > 0 for case in cases)
    assert table.read_text().count("\n| ") == len(cases) + 1


def test_failing_parity_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong() -> gpu.Case:
        raise AssertionError("differs")

    monkeypatch.setattr(gpu, "collect", lambda place: [("broken", wrong)])
    assert gpu.main(["--dry-run", "--out", str(tmp_path)]) == 1
    (report,) = tmp_path.glob("*.json")
    assert json.loads(report.read_text())["cases"][0]["parity"] == "FAILED"


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1
    assert "--dry-run" in capsys.readouterr().err
