"""The command line under nonsense: exit status 1, one line on stderr that names what is wrong, nothing on stdout."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memopt.cli import main
from memopt.planner import Plan

HERE = "tests.facade.test_cli_nonsense"
MODEL = f"{HERE}:made"


def made() -> tuple[nn.Module, tuple[Tensor]]:
    """A model that fits anywhere."""
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), (torch.zeros(4, 8),)


def raises() -> Any:
    """A user's mistake."""
    raise KeyError("no such weight")


def exits() -> Any:
    """A script that ends the program."""
    raise SystemExit("sorry")


def nothing() -> Any:
    """No model."""
    return 3


class Branching(nn.Module):
    """Goes by a value, which no trace knows."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y * 2 if y.sum() > 3 else y


class Converting(Branching):
    """Leaves torch."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.detach().numpy().sum()


def branching() -> tuple[nn.Module, tuple[Tensor]]:
    """For ``module:callable``."""
    return Branching(), (torch.zeros(4, 8),)


def converting() -> tuple[nn.Module, tuple[Tensor]]:
    """For ``module:callable``."""
    return Converting(), (torch.zeros(4, 8),)


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def called(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["memopt", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        shown = capsys.readouterr()
        return stopped.value.code, shown.out, shown.err  # type: ignore[return-value]

    return called


NONSENSE = [
    ("plan", "Missing argument 'MODEL'"),
    ("nonsense", "nonsense"),
    (f"plan {MODEL} --nonsense", "--nonsense"),
    (f"plan {MODEL} --batch 0", "--batch"),
    (f"plan {MODEL} --batch many", "--batch"),
    (f"plan {MODEL} --seq -1", "--seq"),
    (f"plan {MODEL} --zero 4", "--zero"),
    (f"plan {MODEL} --tensor 0", "--tensor"),
    (f"plan {MODEL} --pipeline-stages 0", "--pipeline-stages"),
    (f"plan {MODEL} --budget= --hardware cpu", "budget ''"),
    (f"plan {MODEL} --budget 50% --hardware cpu", "budget '50%' is not a size"),
    (f"plan {MODEL} --budget -1GiB --hardware cpu", "budget '-1GiB' is not a size"),
    (f"plan {MODEL} --budget 0 --hardware cpu", "at least 1"),
    (f"plan {MODEL} --seq 128", "makes its own batch, so that --seq"),
    (f"plan {MODEL} --batch 2", "makes its own batch, so that --batch"),
    (f"plan {MODEL} --max-seq", "makes its own batch, so that --max-seq"),
    ("plan gpt2 --max-seq --max-batch", "give one of them"),
    ("plan llama3-8b", r"unknown model 'llama3-8b' \(did you mean llama-3-8b"),
    ("plan gpt2 --hardware h1000", r"unknown hardware 'h1000' \(did you mean h100"),
    ("plan gpt2 --optimizer adamv", r"unknown optimizer 'adamv' \(did you mean adam"),
    (f"plan {HERE}:raises", r"KeyError: 'no such weight' \(at test_cli_nonsense.py:\d+\)"),
    (f"plan {HERE}:exits", "SystemExit: sorry"),
    (f"plan {HERE}:nothing", "must return"),
    (f"plan {HERE}:HERE", "must be a function without arguments"),
    (f"plan {HERE}:gone", "has no 'gone'"),
    ("plan no.such.module:gone", "cannot import 'no.such.module'"),
    (f"plan {HERE}:converting", r"at test_cli_nonsense.py:\d+"),
    ("place here.csv --capacity 0", "--capacity"),
    ("place here.csv --time-limit nan", "--time-limit"),
    ("probe --out /no/such/folder/x.json", "there is no folder '/no/such/folder'"),
    ("bench too much", "too much"),
]


@pytest.mark.parametrize(("line", "message"), NONSENSE, ids=[line for line, _ in NONSENSE])
def test_nonsense_is_refused_in_one_line(run: Run, line: str, message: str) -> None:
    status, out, err = run(*line.split())
    assert (status, out) == (1, "")
    (told,) = err.splitlines()
    assert told.startswith("memopt: ")
    assert re.search(message, told)


@pytest.mark.parametrize("option", ["--out", "--html", "--perfetto", "--snapshot"])
def test_a_file_that_cannot_be_written_is_told_before_the_work(run: Run, option: str, tmp_path: Path) -> None:
    """The model's name is wrong as well, and has not been looked at."""
    missing = tmp_path / "missing" / "file"
    assert "there is no folder" in run("plan", "no-model", option, str(missing))[2]
    assert "it is a folder" in run("plan", "no-model", option, str(tmp_path))[2]
    assert not list(tmp_path.iterdir())


def test_a_step_that_depends_on_values_says_where(run: Run) -> None:
    status, out, _ = run("plan", f"{HERE}:branching", "--hardware", "cpu")
    assert status == 0
    assert "depends on values at test_cli_nonsense.py:" in " ".join(out.split())
    assert "depends on values" not in run("plan", MODEL, "--hardware", "cpu")[1]


def test_out_is_a_plan_and_json_the_same(run: Run, tmp_path: Path) -> None:
    status, out, _ = run("plan", MODEL, "--hardware", "cpu", "--json", "--out", str(tmp_path / "plan.json"))
    assert status == 0
    loaded, printed = Plan.load(tmp_path / "plan.json"), json.loads(out)
    assert loaded.peak_bytes == printed["peak_bytes"]
    assert {"status", "peak_bytes", "by_category", "blocks", "format_version"} <= printed.keys()


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_a_page_keeps_to_the_width_and_has_no_colours_when_piped(
    run: Run, monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    _, out, _ = run("plan", MODEL, "--hardware", "cpu", "--budget", "1MiB")
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= int(columns)


def test_help_without_arguments(run: Run) -> None:
    assert run()[0] == 0


@pytest.mark.parametrize("stage", ["find_model", "trace", "plan_in_tiles"])
def test_an_interrupt_is_no_traceback(run: Run, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"memopt.planner.{stage}", interrupted)
    status, out, err = run("plan", MODEL, "--hardware", "cpu")
    assert (status, out) == (130, "")
    assert "Traceback" not in err


def test_a_reader_that_leaves_early_gets_no_traceback() -> None:
    code = "from memopt.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "--version"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    process.wait()
