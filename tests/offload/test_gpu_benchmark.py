"""The GPU benchmark's dry run walks through every method, a plan that does something among them."""

from __future__ import annotations

import pytest

import memopt
from benchmarks import gpu_offload


def test_dry_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    applied = []
    apply = memopt.apply
    monkeypatch.setattr(memopt, "apply", lambda model, plan: applied.append(plan) or apply(model, plan))
    assert gpu_offload.main(["--dry-run"]) == 0
    out = capsys.readouterr().out
    for method in ("plain", "checkpoint", "checkpoint, save_on_cpu", "memopt plan"):
        assert f"{{'method': '{method}', 'tokens': 32" in out
    assert len(applied) == 2
    for plan in applied:
        assert {part.action.value for block in plan.blocks for part in block.actions} > {"keep"}


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu_offload.main([]) == 1
    assert "no GPU found" in capsys.readouterr().err
