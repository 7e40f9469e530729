"""The command line as a user meets it: pages, JSON, files and exit statuses, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from memopt.planner import Plan


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


def test_plan_that_fits_prints_a_page_and_saves_files(tmp_path: Path) -> None:
    out, page = tmp_path / "plan.json", tmp_path / "plan.html"
    result = memopt(
        "plan", "gpt2", "--budget", "8GiB", "--hardware", "rtx-4090", "--seq", "512", "--out", out, "--html", page
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("FITS")
    plan = Plan.load(out)
    assert plan.peak_bytes <= 8 * 2**30
    assert "before" in page.read_text()


def test_plan_that_does_not_fit_says_what_would() -> None:
    result = memopt("plan", "gpt2", "--budget", "600MiB", "--hardware", "rtx-4090", "--seq", "1024", "--json")
    assert result.returncode == 2, result.stderr
    answer = json.loads(result.stdout)
    assert answer["status"] == "infeasible"
    again = memopt(
        "plan",
        "gpt2",
        "--budget",
        str(answer["smallest_budget_bytes"]),
        "--hardware",
        "rtx-4090",
        "--seq",
        "1024",
        "--json",
    )
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["peak_bytes"] <= answer["smallest_budget_bytes"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "gtp2"], ["gtp2", "gpt2"]),
        (["plan", "gpt2", "--hardware", "rtx-9999"], ["rtx-9999", "rtx-4090"]),
        (["plan", "gpt2", "--optimizer", "adamw7bit"], ["adamw7bit", "adamw,", "8bit"]),
        (["plan", "gpt2", "--budget", "lots"], ["lots", "24GiB"]),
        (["plan", "gpt2", "--budget", "10MiB"], ["weights alone"]),
        (["plan", "gpt2", "--dtype", "int3"], ["int3", "bf16"]),
        (["place", "missing.csv"], ["missing.csv"]),
    ],
    ids=lambda value: "-".join(value)[:40],
)
def test_bad_input_is_one_clear_line(arguments: list[str], words: list[str]) -> None:
    line = one_line(memopt(*arguments))
    for word in words:
        assert word in line


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
