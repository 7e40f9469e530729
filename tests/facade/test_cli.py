"""The command line as a user meets it: pages, JSON, files and exit statuses, each in a process of its own."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pulp
import pytest
import torch
from torch import nn

from memopt.cli import main
from memopt.planner import Plan
from memopt.planner.models.reference_models import Decoder, DecoderConfig


def memopt(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            "-W",
            "error::UserWarning:memopt",
            "-c",
            "from memopt.cli import main; main()",
            *map(str, arguments),
        ],
        capture_output=True,
        text=True,
    )


def one_line(result: subprocess.CompletedProcess[str]) -> str:
    """The message of a refused call; fails where it is a traceback or more than one line."""
    assert result.returncode == 1, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("memopt: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return lines[0]


@pytest.mark.parametrize(
    "command", [[], ["plan"], ["place"], ["probe"], ["bench"]], ids=lambda c: " ".join(c) or "memopt"
)
def test_help_of_every_command(command: list[str]) -> None:
    result = memopt(*command, "--help")
    assert result.returncode == 0
    assert "Usage" in result.stdout
    assert "<bool>" not in result.stdout
    assert "…" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    if command:
        assert f"Example: memopt {command[0]}" in result.stdout
    if command == ["plan"]:
        panels = ["Model", "Budget and hardware", "Training", "Sharding", "Output"]
        starts = [result.stdout.index(f"─ {panel} ─") for panel in panels]
        assert starts == sorted(starts)


def small_model() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A GPT-2 of two layers, for ``module:callable``: quick to trace and to plan."""
    sizes = {"layers": 4, "width": 128, "heads": 2, "vocabulary": 32768, "context": 256, "mlp_width": 512}
    tokens = torch.empty(8, 256, dtype=torch.long, device="meta")
    with torch.device("meta"):
        return Decoder(DecoderConfig(**sizes)), {"tokens": tokens, "targets": tokens}


SMALL = "tests.facade.test_cli:small_model"


def test_plan_that_fits_prints_a_page_and_saves_files(tmp_path: Path) -> None:
    out, page, snapshot = tmp_path / "plan.json", tmp_path / "plan.html", tmp_path / "plan.pickle"
    files = ("--out", out, "--html", page, "--snapshot", snapshot)
    result = memopt("plan", SMALL, "--budget", "880MiB", "--hardware", "rtx-4090", *files)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert result.stdout.startswith("FITS")
    assert "What happens to the activations" in result.stdout
    plan = Plan.load(out)
    assert plan.peak_bytes <= 880 * 2**20 < plan.baseline_peak_bytes
    assert page.read_text().count('"boxes":') == 2
    assert pickle.loads(snapshot.read_bytes())["segments"][0]["total_size"] == plan.peak_bytes


def test_plan_that_does_not_fit_says_what_would() -> None:
    result = memopt("plan", SMALL, "--budget", "200MiB", "--hardware", "rtx-4090", "--pipeline-stages", "2")
    assert result.returncode == 2, result.stderr
    assert "zeropp" in result.stdout
    assert "DOES NOT FIT" in result.stdout
    assert "The smallest budget that fits is" in result.stdout
    assert "What to change: chunked loss" in " ".join(result.stdout.split())
    again = memopt("plan", SMALL, "--budget", "200MiB", "--hardware", "rtx-4090", "--json", "--chunked-loss")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["peak_bytes"] <= 200 * 2**20


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "gtp2"], ["gtp2", "gpt2"]),
        (["plan", "gpt2", "--hardware", "rtx-9999"], ["rtx-9999", "rtx-4090"]),
        (["plan", "gpt2", "--optimizer", "adamw7bit"], ["adamw7bit", "adamw,", "8bit"]),
        (["plan", "gpt2", "--budget", "lots"], ["lots", "24GiB"]),
        (["plan", "gpt2", "--dtype", "int3"], ["int3", "bf16"]),
        (["place", "missing.csv"], ["missing.csv"]),
    ],
    ids=lambda value: "-".join(value)[:40],
)
def test_bad_input_is_one_clear_line(
    arguments: list[str], words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["memopt", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    for word in words:
        assert word in line


def test_a_budget_below_the_weights_gives_the_smallest_that_fits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["memopt", "plan", SMALL, "--budget", "10MiB", "--hardware", "rtx-4090"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    shown = " ".join(capsys.readouterr().out.split())
    assert "The smallest budget that fits is" in shown
    assert "What binds: the weights alone" in shown


def test_a_solver_that_fails_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(pulp.PULP_CBC_CMD, "pulp_cbc_path", str(tmp_path / "gone"))
    monkeypatch.setattr(sys, "argv", ["memopt", "plan", SMALL, "--budget", "880MiB", "--hardware", "rtx-4090"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "cbc" in line


def test_bad_input_leaves_no_traceback_in_a_process_of_its_own() -> None:
    assert "missing.csv" in one_line(memopt("place", "missing.csv"))


def test_place_reads_and_writes_csv(tmp_path: Path) -> None:
    source, out = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text("id,lower,upper,size\nb1,0,3,4\nb2,3,9,4\nb3,0,9,4\nb4,9,21,4\nb5,0,21,4\n")
    result = memopt("place", source, "--out", out, "--json")
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    assert (figures["peak"], figures["proven"]) == (12, True)
    assert len(out.read_text().splitlines()) == 6


def test_place_says_when_nothing_fits(tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    source.write_text("id,lower,upper,size\na,0,2,4\nb,1,3,4\n")
    result = memopt("place", source, "--capacity", "7")
    assert result.returncode == 2
    assert "IMPOSSIBLE" in result.stdout


def test_version() -> None:
    assert memopt("--version").stdout.strip()


def test_a_missing_library_is_named_before_the_work_begins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setattr(sys, "argv", ["memopt", "plan", "no-such-model", "--html", str(tmp_path / "x.html")])
    with pytest.raises(SystemExit, match="1"):
        main()
    assert capsys.readouterr().err == "memopt: the HTML report needs plotly: pip install 'memopt[report]'\n"
