"""Randomised restarts of the skyline search, and the smallest capacity that they can reach.

Attempts follow the Luby sequence times four steps a buffer (at least 400), each with freshly drawn score weights, so
that no single weighting has to suit every instance; counts of failed bounds carry over from attempt to attempt and
fade. Everything is drawn from one seeded generator, so a seed fixes the result as long as the node limit, not the
clock, ends the search.
"""

from __future__ import annotations

import random
import time

from memopt.planner.placement.instance import Part
from memopt.planner.placement.native import attempt_for
from memopt.planner.placement.skyline import Attempt, Score, Verdict, log2_fixed
from memopt.planner.placement.task import Method, Task

_BASE_NODES = 400
_NODES_PER_BUFFER = 4
_LARGEST = 6000  # buffers; the neighbour lists grow with the square
_PRECISION = 1000  # bisection stops when the open range is below 1/1000 of the peak
_ROUNDS = (64, 8, 1)  # what the node limit is divided by


def search(part: Part, capacity: int, seed: int, node_limit: int, seconds: float) -> Attempt:
    """Offsets within ``capacity`` units, or why there are none: ``EXHAUSTED`` is a proof, the other verdicts are not.

    Equal arguments give equal results with and without a C++ compiler unless the verdict is ``OUT_OF_TIME``.
    """
    deadline = time.monotonic() + seconds
    attempt = attempt_for(part, capacity)
    draw = random.Random(seed)
    failures = [0] * part.sections
    base = max(_BASE_NODES, _NODES_PER_BUFFER * len(part))
    nodes = 0
    for turn in range(1, node_limit + 2):
        if nodes >= node_limit:
            return Attempt(Verdict.OUT_OF_NODES, nodes, ())
        left = deadline - time.monotonic()
        if left <= 0:
            return Attempt(Verdict.OUT_OF_TIME, nodes, ())
        allowed = min(base * luby(turn), node_limit - nodes)
        result = attempt(part, capacity, draw_score(part, draw), failures, allowed, left)
        nodes += result.nodes
        if result.verdict is not Verdict.OUT_OF_NODES:
            return Attempt(result.verdict, nodes, result.offsets)
        failures[:] = [count * 9 // 10 for count in failures]
    raise AssertionError("an attempt takes at least one node")


def draw_score(part: Part, draw: random.Random) -> Score:
    """Random weights in 1/64: crowding 2 to 256 (log-uniform), the others linear up to a few units."""
    crowd = (64 + draw.getrandbits(6)) << 1 + draw.randrange(7)
    conflict, waste = draw.randrange(385), draw.randrange(385)
    width, size, noise = draw.randrange(19, 161), draw.randrange(19, 129), draw.randrange(13, 97)
    fixed = [
        width * log2_fixed(high - low) + size * log2_fixed(units) + noise * draw.getrandbits(16)
        for low, high, units in zip(part.low, part.high, part.size, strict=True)
    ]
    return Score(fixed, crowd, conflict, waste)


def luby(turn: int) -> int:
    """The Luby sequence 1, 1, 2, 1, 1, 2, 4, ... from ``turn`` 1 on."""
    power = turn.bit_length()
    return 1 << (power - 1) if turn == (1 << power) - 1 else luby(turn - (1 << (power - 1)) + 1)


def run(task: Task) -> None:
    """Tries the goal, then, when any better peak is welcome, halves the range between it and the best peak.

    Hard goals must not use up the time that easier capacities need, so there are rounds, each with eight times the
    nodes of the one before it for every capacity that it tries.
    """
    if len(task.part) > _LARGEST:
        task.remarks.append(f"search left out: {len(task.part)} buffers alive in one stretch, it takes {_LARGEST}")
        return
    if not task.minimise:
        _try(task, task.goal, 0, task.node_limit)
        return
    for number, share in enumerate(_ROUNDS):
        tried = -1  # the largest capacity that was not found in this round
        while not task.done and task.seconds_left():
            lowest = max(task.goal, task.lower)  # rises with every proof
            if tried >= lowest and task.peak - tried <= max(1, task.peak // _PRECISION):
                break
            capacity = lowest if tried < lowest else (tried + task.peak) // 2
            if not _try(task, capacity, number, max(1, task.node_limit // share)):
                tried = capacity


def _try(task: Task, capacity: int, number: int, node_limit: int) -> bool:
    seed = task.seed * len(_ROUNDS) + number
    result = search(task.part, capacity, seed, node_limit, task.seconds_left())
    if result.verdict is Verdict.FOUND:
        return task.offer(result.offsets, "search")
    if result.verdict is Verdict.EXHAUSTED:
        task.prove(capacity + 1, f"the search space at {capacity} units is exhausted")
    return False


METHOD = Method("search", rank=1, run=run, share=0.6)
