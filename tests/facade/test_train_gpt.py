"""The demo, tiny: it runs end to end and its figures mean what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from examples import train_gpt
from examples.gpt import GPT, GPTConfig, batches, read_text

TINY = ["--steps", "8", "--batch", "8", "--context", "64", "--layers", "3", "--width", "64", "--heads", "4"]


def app() -> object:
    import typer

    application = typer.Typer()
    application.command()(train_gpt.main)
    return application


def test_demo_writes_the_figures_of_both_runs(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app(), [*TINY, "--budget", "70%", "--json", str(tmp_path / "run.json"), "--html", str(tmp_path / "run.html")]
    )
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "run.json").read_text())
    assert sorted(figures) == ["memopt", "plain"]
    for run in figures.values():
        assert sum(run["peak_by_category"].values()) == run["peak_bytes"]
        assert run["predicted_peak_bytes"] == pytest.approx(run["peak_bytes"], rel=0.05)
        assert run["step_seconds"] > 0
    assert figures["memopt"]["peak_bytes"] <= 0.72 * figures["plain"]["peak_bytes"]
    assert figures["memopt"]["optimizer_state_bytes"] < 0.5 * figures["plain"]["optimizer_state_bytes"]
    assert figures["memopt"]["final_loss"] == pytest.approx(figures["plain"]["final_loss"], rel=0.01)
    page = (tmp_path / "run.html").read_text()
    assert "plain torch" in page
    assert "memopt" in page


def test_demo_takes_a_users_text(tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_bytes(b"in a hole in the ground there lived a hobbit. " * 200)
    result = CliRunner().invoke(app(), [*TINY, "--budget", "80%", "--text", str(own)])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("content", [None, b"short"])
def test_demo_refuses_a_text_it_cannot_use(tmp_path: Path, content: bytes | None) -> None:
    own = tmp_path / "own.txt"
    if content is not None:
        own.write_bytes(content)
    result = CliRunner().invoke(app(), [*TINY, "--text", str(own)])
    assert result.exit_code == 1
    assert "own.txt" in result.output.replace("\n", "")


def test_batches_repeat_for_a_seed_and_shift_the_targets_by_one() -> None:
    text = read_text(None, limit_bytes=2**16)
    assert text.dtype == torch.uint8
    assert len(text) == 2**16
    first, again = next(batches(text, 4, 32, seed=3)), next(batches(text, 4, 32, seed=3))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[0][:, 1:], first[1][:, :-1])
    assert not torch.equal(first[0], next(batches(text, 4, 32, seed=4))[0])


def test_the_default_model_has_about_twenty_million_parameters() -> None:
    with torch.device("meta"):
        model = GPT(GPTConfig())
    assert 18e6 < sum(p.numel() for p in model.parameters()) < 22e6
