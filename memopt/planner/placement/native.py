"""The compiled skyline search; :mod:`memopt.planner.placement.skyline` is its reference and its replacement."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt

from memopt.native_build import build
from memopt.planner.placement import skyline
from memopt.planner.placement.instance import Part
from memopt.planner.placement.skyline import Attempt, Score, Verdict

_SOURCE = Path(__file__).with_name("skyline.cpp")
_CAPACITY_LIMIT = 1 << 46  # fixed-point scores shift the capacity by 16 bits

AttemptFunction = Callable[[Part, int, Score, list[int], int, float], Attempt]


def attempt_for(part: Part, capacity: int) -> AttemptFunction:
    """The fastest implementation that can take this part on this machine; all return the same."""
    function = _library()
    if function is None or capacity >= _CAPACITY_LIMIT:
        return skyline.attempt
    arrays = _Arrays(part)

    def attempt(
        same: Part, capacity: int, score: Score, failures: list[int], node_limit: int, seconds: float = 1e9
    ) -> Attempt:
        if same is not part:
            raise ValueError("this function was made for another part")
        return arrays.attempt(function, capacity, score, failures, node_limit, seconds)

    return attempt


@cache
def _library() -> Callable[..., int] | None:
    library = build("skyline", _SOURCE.read_text(encoding="utf-8"), openmp=False)
    if library is None:
        return None
    function = library.memopt_skyline
    i32, i64, array = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
    function.argtypes = [i32, i32, *[array] * 6, i64, *[array] * 3, i64, ctypes.c_double, array, array]
    function.restype = i32
    found: Callable[..., int] = function
    return found


class _Arrays:
    """A part as the native code reads it."""

    def __init__(self, part: Part) -> None:
        self.count, self.sections = len(part), part.sections
        near = part.neighbours
        starts = [0, *accumulate(len(row) for row in near)]
        self.columns: list[npt.NDArray[np.int32] | npt.NDArray[np.int64]] = [
            np.array(part.low, dtype=np.int32),
            np.array(part.high, dtype=np.int32),
            np.array(part.size, dtype=np.int64),
            np.array(starts, dtype=np.int32),
            np.array([k for row in near for k in row], dtype=np.int32),
            np.array(part.twins, dtype=np.int32),
        ]

    def attempt(
        self,
        function: Callable[..., int],
        capacity: int,
        score: Score,
        failures: list[int],
        node_limit: int,
        seconds: float,
    ) -> Attempt:
        fixed = np.array(score.fixed, dtype=np.int64)
        weights = np.array([score.crowd, score.conflict, score.waste], dtype=np.int64)
        counts = np.array(failures, dtype=np.int64)
        offsets = np.zeros(self.count, dtype=np.int64)
        nodes = np.zeros(1, dtype=np.int64)
        code = function(
            self.count,
            self.sections,
            *(column.ctypes.data for column in self.columns),
            capacity,
            fixed.ctypes.data,
            weights.ctypes.data,
            counts.ctypes.data,
            node_limit,
            seconds,
            offsets.ctypes.data,
            nodes.ctypes.data,
        )
        failures[:] = counts.tolist()
        verdict = Verdict(code)
        found = tuple(offsets.tolist()) if verdict is Verdict.FOUND else ()
        return Attempt(verdict, int(nodes[0]), found)
