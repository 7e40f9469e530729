"""Buffers, max-live, the reduction to sections, and the independent check."""

from __future__ import annotations

import numpy as np
import pytest

from memopt.planner import Buffer
from memopt.planner.placement import find_fault, max_live
from memopt.planner.placement.instance import reduce
from tests.planner.placement_cases import planted, scattered


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((3, 3, 1), ValueError, r"lifetime \[3, 3\) is empty"),
        ((5, 3, 1), ValueError, "start < stop"),
        ((0, 1, -1), ValueError, "size is -1"),
        ((0, 1, 1.5), TypeError, "size is 1.5, expected an integer"),
        (("0", 1, 1), TypeError, "start is '0'"),
    ],
)
def test_bad_buffers_are_refused(arguments, error, says):
    with pytest.raises(error, match=says):
        Buffer(*arguments)


def test_a_buffer_takes_any_integer_and_tells_its_name():
    assert Buffer(np.int64(0), np.int32(2), True) == Buffer(0, 2, 1)
    with pytest.raises(ValueError, match="'weights'"):
        Buffer(0, 0, 1, "weights")


def test_lifetimes_are_half_open():
    assert not Buffer(0, 3, 1).meets(Buffer(3, 5, 1))
    assert Buffer(0, 4, 1).meets(Buffer(3, 5, 1))
    assert max_live([Buffer(0, 3, 8), Buffer(3, 5, 8)]) == 8
    assert max_live([]) == 0


@pytest.mark.parametrize("seed", range(5))
def test_sections_keep_exactly_the_meetings(seed):
    buffers = scattered(seed, 60)
    instance = reduce(buffers)
    where = {index: (p, k) for p, part in enumerate(instance.parts) for k, index in enumerate(part.index)}
    assert sorted(where) == list(range(60))
    for i, first in enumerate(buffers):
        for j, second in enumerate(buffers):
            (p, k), (q, m) = where[i], where[j]
            part = instance.parts[p]
            together = p == q and part.low[k] < part.high[m] and part.low[m] < part.high[k]
            assert together == first.meets(second)
            if i != j and p == q:
                assert (m in part.neighbours[k]) == together
    assert instance.max_live * instance.unit == max_live(buffers)


def test_reduction_divides_sizes_and_cuts_time():
    instance = reduce([Buffer(0, 4, 600), Buffer(4, 9, 900), Buffer(5, 6, 0)])
    assert instance.unit == 300
    assert [part.size for part in instance.parts] == [(2,), (3,)]
    assert reduce([Buffer(0, 1, 1)], alignment=512).unit == 512


@pytest.mark.parametrize(
    ("offsets", "capacity", "alignment", "says"),
    [
        ([0, 4], None, 1, "2 offsets for 3 buffers"),
        ([0, -4, 0], None, 1, "negative"),
        ([0, 4.0, 0], None, 1, "not an integer"),
        ([0, 4, 2], None, 4, "alignment 4"),
        ([0, 4, 0], 7, 1, "ends at 8, beyond the capacity 7"),
        ([0, 3, 8], None, 1, r"buffer 0 \(a\) and buffer 1 \(b\) are alive at once"),
    ],
)
def test_the_check_names_the_broken_rule(offsets, capacity, alignment, says):
    buffers = [Buffer(0, 3, 4, "a"), Buffer(2, 5, 4, "b"), Buffer(5, 6, 4)]
    assert find_fault(buffers, [0, 4, 0]) is None
    with pytest.raises(AssertionError, match=says):
        assert find_fault(buffers, offsets, capacity, alignment) is None, find_fault(
            buffers, offsets, capacity, alignment
        )


def test_the_check_finds_every_single_overlap():
    buffers = planted(0, 12, 64)
    for i in range(12):
        for j in range(12):
            if i != j:
                apart = [1000 * k for k in range(12)]
                apart[j] = apart[i]
                assert (find_fault(buffers, apart) is not None) == buffers[i].meets(buffers[j])


def test_zero_bytes_overlap_nothing():
    assert find_fault([Buffer(0, 3, 4), Buffer(0, 3, 0)], [0, 2]) is None
