"""``memopt plan --tiles``: never, always, and by itself where nothing fits otherwise."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memopt.cli import main
from tests.offload.tiled import Model

MODEL = "tests.facade.test_cli_tiles:made"


def made() -> tuple[nn.Module, tuple[Tensor]]:
    return Model(), (torch.zeros(2, 256, 64),)


def _plan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[Any, str]:
    arguments = ["memopt", "plan", MODEL, "--hardware", "cpu", "--dtype", "fp32", *options]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code, capsys.readouterr().out


def test_tiles_by_number_never_and_by_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out = _plan(monkeypatch, capsys, "--budget", "1.2MiB", "--tiles", "8", "--json")
    asked = json.loads(out)
    assert status == 2
    assert [tile["chunks"] for tile in asked["tiles"]] == [8, 8]
    budget = ("--budget", str(asked["smallest_budget_bytes"]))
    status, out = _plan(monkeypatch, capsys, *budget, "--tiles", "1", "--json")
    assert status == 2
    assert json.loads(out)["tiles"] == []
    status, out = _plan(monkeypatch, capsys, *budget)
    assert status == 0
    assert "In 8 tiles each: 2 x mlp" in out
