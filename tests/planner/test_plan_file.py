"""Plans as JSON files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from memopt.planner import Action, Plan, plan, validate
from memopt.planner.plan_file import FORMAT_VERSION
from tests.planner.toy import CPU, transformer


@pytest.fixture(scope="module")
def made() -> Plan:
    trace = transformer(2)
    return plan(trace, int(trace.peak_bytes * 0.8), CPU)


def test_a_plan_comes_back_as_it_was(made: Plan, tmp_path: Path) -> None:
    made.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json", transformer(2)) == made
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_a_plan_of_the_first_format_keeps_the_inputs() -> None:
    path = Path(__file__).parent / "data" / "plan_version_1.json"
    found = Plan.load(path, transformer(2))
    assert json.loads(path.read_text())["format_version"] == 1
    assert found.format_version == FORMAT_VERSION
    assert all(block.inputs == () for block in found.blocks)
    assert {a.action for block in found.blocks for a in block.actions} == {Action.KEEP, Action.RECOMPUTE}
    assert validate(transformer(2), found, CPU).broken is None


def change(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.update(format_version=99), "format version 99.*reads versions 1 to 4: plan again"),
        (lambda d: d.update(format_version=True), "format version True"),
        (lambda d: d.pop("format_version"), "lacks the field 'format_version'"),
        (lambda d: d.update(extra=1), "unknown field 'extra'"),
        (lambda d: d.pop("peak_bytes"), "lacks the field 'peak_bytes'"),
        (lambda d: d.update(peak_bytes="big"), r"plan\.peak_bytes is 'big'; it must be an integer"),
        (lambda d: d.update(peak_bytes=True), r"plan\.peak_bytes is True"),
        (lambda d: d.update(gap=float("inf")), r"plan\.gap is inf; it must be a finite number"),
        (lambda d: d.update(status="perhaps"), r"plan\.status is 'perhaps'; it must be one of 'optimal'"),
        (lambda d: d.update(blocks={}), r"plan\.blocks is \{\}; it must be a list"),
        (
            lambda d: d["blocks"][1]["actions"][0].pop("action"),
            r"plan\.blocks\[1\]\.actions\[0\] lacks the field 'action'",
        ),
        (lambda d: d.update(peak_bytes=d["peak_bytes"] + 1), "not what memopt wrote, its digest differs: plan again"),
        (lambda d: d.pop("digest"), "lacks the field 'digest'"),
        (lambda d: d["by_category"].update(weights=1.5), r"plan\.by_category\.weights is 1\.5"),
    ],
)
def test_wrong_files_are_refused_by_field(
    made: Plan, tmp_path: Path, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    path = tmp_path / "plan.json"
    made.save(path)
    change(path, edit)
    with pytest.raises(ValueError, match=message):
        Plan.load(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_what_is_no_plan_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"plan\.json'? (is not JSON|lacks)"):
        Plan.load(path)


def test_a_plan_for_something_else_is_refused_with_what_differs(made: Plan) -> None:
    other = transformer(2)
    with pytest.raises(ValueError, match="model toy, the trace is of model other"):
        made.check_model(replace(other, model="other"))
    with pytest.raises(ValueError, match="dtype float32, the trace is of dtype bfloat16"):
        made.check_model(replace(other, dtype="bfloat16"))
    with pytest.raises(ValueError, match=r"block blocks\.1 \(call 0\) of the plan .* in the trace it is missing"):
        made.check_model(transformer(1))
    changed = replace(other.blocks[1], signature="else")
    with pytest.raises(ValueError, match=r"block blocks\.1 .* in the trace it is else"):
        made.check_model(replace(other, blocks=(other.blocks[0], changed)))
    with pytest.raises(ValueError, match="another step"):
        made.check_model(transformer(2, logits=9))


def test_a_plan_that_cannot_be_written_leaves_nothing(made: Plan, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        made.save(tmp_path / "missing" / "plan.json")
    assert list(tmp_path.iterdir()) == []
