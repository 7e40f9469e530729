"""What the terminal page says, read as a user reads it."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from memopt.planner import Plan, Status, parse_bytes, plan
from memopt.report.terminal import enough, plan_page
from tests.planner import toy


@pytest.mark.parametrize("size", [1, 1023, 1025, 2**20 + 1, 1073741825, 5 * 2**30 - 1, 3 * 2**41 + 7])
def test_the_smallest_budget_is_one_that_can_be_typed(size: int) -> None:
    assert size <= parse_bytes(enough(size)) <= 1.001 * size


def page(found: Plan, width: int = 80) -> str:
    written = io.StringIO()
    Console(width=width, file=written).print(plan_page(found))
    return written.getvalue()


@pytest.fixture(scope="module")
def found() -> Plan:
    return plan(toy.transformer(), None, toy.GPU)


def test_a_budget_missed_by_a_little_is_not_said_to_be_met(found: Plan) -> None:
    missed = replace(
        found, status=Status.INFEASIBLE, budget_bytes=2**30, peak_bytes=2**30 + 9, smallest_budget_bytes=2**30 + 9
    )
    assert "peak a little over 1.0 GiB of 1.0 GiB" in " ".join(page(missed).split())
    assert "The smallest budget that fits is 1025MiB." in page(missed)


def test_names_are_words_and_room_is_shown(found: Plan) -> None:
    roomy = replace(found, budget_bytes=2 * found.peak_bytes, peak_at="aten._log_softmax.default")
    shown = page(roomy)
    assert "in log softmax" in shown
    assert "aten." not in shown
    assert "_" not in shown
    assert "free" in shown
    assert "recompute" not in shown.split("What happens")[0]  # the plan costs nothing


def test_headings_are_not_broken_at_the_width_of_their_tables(found: Plan) -> None:
    assert any(line.startswith("What happens to the activations: keep") for line in page(found).splitlines())
    assert max(map(len, page(found, 60).splitlines())) <= 60
