"""Statements cut in two stages: together they compute what the whole does."""

from __future__ import annotations

import re

import pytest

from memopt.kernels import codec_names, get_codec
from memopt.kernels.native.cpp import stage_functions
from memopt.kernels.native.stages import staged, uses


def names(lines: list[str]) -> set[str]:
    return {line.split()[1] for line in lines}


def test_slow_operations_and_what_they_need_come_first() -> None:
    lines = ["vf t0 = x * y;", "vf t1 = vsqrt(t0);", "vf t2 = x + z;", "vf t3 = t2 * t0;", "vf t4 = fma(t1, t3, z);"]
    stages = staged(lines, ["t4"])
    assert stages is not None
    assert stages.first == lines[:2]
    assert stages.second == lines[2:]
    assert stages.kept == ["t0", "t1"]


@pytest.mark.parametrize(
    "lines",
    [
        [],
        ["vf t0 = x + y;"],  # nothing slow
        ["vf t0 = x / y;"],  # nothing else
        ["vm t0 = lt(x, y);", "vf t1 = select(t0, x / y, y);", "vf t2 = select(t0, t1, x);"],  # a mask to keep
        ["store(p, x);", "vf t0 = vsqrt(x);", "vf t1 = t0 + x;"],  # not a definition
    ],
)
def test_none_where_there_is_nothing_to_begin_or_to_keep(lines: list[str]) -> None:
    assert staged(lines, [line.split()[1] for line in lines[-1:]]) is None


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("name", codec_names())
def test_stages_of_codecs_take_only_what_was_kept(name: str, rounding: str) -> None:
    text, stages = stage_functions(get_codec(name), rounding, "0")
    assert bool(text) == (stages is not None)
    if stages is None:
        return
    known = {*names(stages.first)}
    assert set(stages.kept) <= known
    assert not known & names(stages.second)
    for lost in known - set(stages.kept):
        assert not uses(stages.second, lost)
    assert len(re.findall(r"kept\[\d+\] = ", text)) == len(stages.kept)
