"""The GPU benchmark walks through all its cases on the CPU at tiny sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from benchmarks.gpu_cases import Case, Timed


def written(folder: Path) -> tuple[dict[str, Any], str]:
    (report,) = folder.glob("gpu-*-dry-run.json")
    (table,) = folder.glob("gpu-*-dry-run.md")
    return json.loads(report.read_text()), table.read_text()


def test_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMOPT_KERNELS", "torch")  # other tests compile and compare; here it is the walk that counts
    assert gpu.main(["--dry-run", "--out", str(tmp_path)]) == 0
    report, table = written(tmp_path)
    cases = report["cases"]
    assert len(cases) > 70
    assert all(case["parity"] == "ok" and case["seconds"] > 0 for case in cases)
    assert not report["not_run"]
    assert cases[0]["name"].startswith("vocabulary loss 8192 x 256000")
    aims = [aim["aim"] for aim in report["aims"]]
    assert any("2**30 bf16 parameters" in aim for aim in aims)
    assert any("124M model" in aim for aim in aims)
    assert table.count("\n| ") == len(cases) + 1 + len(aims) + 1


def test_failing_parity_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong() -> None:
        raise AssertionError("differs")

    case = Case("broken", wrong, lambda: Timed(lambda: None))
    monkeypatch.setattr(gpu, "collect", lambda place: [case])
    assert gpu.main(["--dry-run", "--out", str(tmp_path)]) == 1
    report, _ = written(tmp_path)
    assert report["cases"][0]["parity"] == "FAILED"
    assert "differs" in report["cases"][0]["error"]


def test_what_time_does_not_allow_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = Case("slow", lambda: None, lambda: Timed(lambda: None))
    monkeypatch.setattr(gpu, "collect", lambda place: [case])
    assert gpu.main(["--dry-run", "--out", str(tmp_path), "--minutes", "0"]) == 0
    report, table = written(tmp_path)
    assert report["not_run"] == ["slow"]
    assert "Not run for lack of time: slow." in table
    assert "not run for lack of time: slow" in capsys.readouterr().out


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1
    assert "--dry-run" in capsys.readouterr().err
