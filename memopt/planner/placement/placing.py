"""``place``: offsets for buffers with lifetimes, staged from the cheapest method to the most expensive.

Reduce to units, sections and independent parts; run the methods in turn on every part that is not good enough; check
the result with code that no method shares. Most training steps stop at the first greedy order, which reaches max-live
and is thereby proven best.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Sequence

from memopt.planner.placement.checking import find_fault, peak_of
from memopt.planner.placement.instance import Instance, reduce
from memopt.planner.placement.methods import choose_methods
from memopt.planner.placement.problem import Buffer, Outcome, Placement
from memopt.planner.placement.task import Method, Task
from memopt.planner.units import format_bytes

_LARGEST_SUM = 1 << 62


class PlacementError(RuntimeError):
    """A method's answer failed the final check; nothing is returned rather than overlapping buffers."""


def place(
    buffers: Sequence[Buffer],
    capacity: int | None = None,
    *,
    seed: int = 0,
    time_limit: float = 20.0,
    node_limit: int = 2_000_000,
    alignment: int = 1,
    methods: Sequence[str] | None = None,
) -> Placement:
    """Finds an offset for every buffer so that no two alive at once share a byte.

    minimise peak = max_i (A_i + S_i)  subject to  A_i + S_i <= A_j or A_j + S_j <= A_i  for all i, j alive at once

    Args:
        buffers: lifetimes ``[start, stop)`` in any integer clock, sizes in bytes.
        capacity: bytes available. With it, the first placement that fits is returned; without it, the peak is made as
            small as the limits allow.
        seed: of the randomised search; equal seeds give equal results unless ``time_limit`` cuts a method short.
        time_limit: seconds for all methods together. One greedy order always runs.
        node_limit: steps of the search for each part and capacity tried.
        alignment: every offset is a multiple of it, and every size is rounded up to one, as allocators do.
        methods: names out of ``memopt.planner.placement.all_methods()``; default: all that are installed, in turn
            until one is good enough.

    Returns:
        A :class:`Placement`. ``status`` is ``NOT_FOUND`` where the limits ended the search, and ``IMPOSSIBLE`` only
        with a proof, which ``reason`` names.

    Raises:
        TypeError, ValueError: an argument out of range, unknown methods, sizes that sum to 2**62 bytes or more.
        PlacementError: the answer fails the final check (a defect; nothing is returned).
    """
    begin = time.monotonic()
    buffers = _checked(buffers)
    alignment = _integer("alignment", alignment, at_least=1)
    seed = _integer("seed", seed, at_least=0)
    node_limit = _integer("node_limit", node_limit, at_least=1)
    if not time_limit > 0:
        raise ValueError(f"time_limit is {time_limit}, expected more than 0 seconds")
    if capacity is not None:
        capacity = _integer("capacity", capacity, at_least=0)
    chosen = choose_methods(methods)
    instance = reduce(buffers, alignment)
    minimise = capacity is None
    goal = instance.max_live if capacity is None else capacity // instance.unit
    tasks = [Task(part, goal, minimise, seed, node_limit, begin + time_limit) for part in instance.parts]
    if minimise or instance.max_live <= goal:
        for method in chosen:
            _run(method, tasks, begin + time_limit)
            if all(task.done for task in tasks):
                break
    return _result(buffers, capacity, alignment, instance, tasks, begin)


def _run(method: Method, tasks: Sequence[Task], deadline: float) -> None:
    for task in tasks:
        if task.minimise:  # a part need not be better than what another one is proven to need
            task.goal = max(other.lower for other in tasks)
        if task.done:
            continue
        now = time.monotonic()
        if now >= deadline:
            return
        task.deadline = now + max(0.0, deadline - now) * method.share
        method.run(task)


def _result(
    buffers: Sequence[Buffer],
    capacity: int | None,
    alignment: int,
    instance: Instance,
    tasks: Sequence[Task],
    begin: float,
) -> Placement:
    unit = instance.unit
    worst = max(tasks, key=lambda task: task.peak, default=None)
    tightest = max(tasks, key=lambda task: task.lower, default=None)
    lower = tightest.lower * unit if tightest else 0
    proof = tightest.proof if tightest else "max-live"
    remarks = "".join(f"; {remark}" for task in tasks for remark in task.remarks)
    seconds = time.monotonic() - begin
    if capacity is not None and lower > capacity:
        reason = (
            f"impossible: at least {lower} bytes ({format_bytes(lower)}) are needed, the capacity is {capacity} "
            f"(proof: {_moment(buffers, alignment) if proof == 'max-live' else proof})"
        )
        best = max(task.peak * unit for task in tasks)
        return Placement((), best, lower, False, "bound", seconds, Outcome.IMPOSSIBLE, reason + remarks)
    if worst is None:
        return Placement((0,) * len(buffers), 0, 0, True, "greedy", seconds, Outcome.PLACED, "nothing to place")
    peak = worst.peak * unit
    if capacity is not None and peak > capacity:
        reason = (
            f"not found in {seconds:.1f} s: the best placement needs {peak} bytes ({format_bytes(peak)}), the capacity "
            f"is {capacity}; whether one exists is open (lower bound {lower})"
        )
        return Placement((), peak, lower, False, worst.method, seconds, Outcome.NOT_FOUND, reason + remarks)
    offsets = instance.offsets_bytes([task.offsets for task in tasks])
    fault = find_fault(buffers, offsets, capacity, alignment)
    if fault is not None or peak < peak_of(buffers, offsets):
        raise PlacementError(f"placement by {worst.method} refused: {fault or 'wrong peak'}")
    proven = peak <= lower
    reason = f"{'proven best' if proven else 'not proven best'}: the lower bound ({proof}) is {lower} bytes"
    seconds = time.monotonic() - begin
    return Placement(offsets, peak, lower, proven, worst.method, seconds, Outcome.PLACED, reason + remarks)


def _moment(buffers: Sequence[Buffer], alignment: int) -> str:
    def live(at: int) -> int:
        return sum(-(-b.size // alignment) * alignment for b in buffers if b.start <= at < b.stop)

    at = max((b.start for b in buffers), key=live)
    return f"{live(at)} bytes are alive at time {at}"


def _checked(buffers: Sequence[Buffer]) -> list[Buffer]:
    listed = list(buffers)
    for i, buffer in enumerate(listed):
        if not isinstance(buffer, Buffer):
            raise TypeError(f"buffers[{i}] is {type(buffer).__name__}, expected memopt.planner.Buffer")
    total = sum(buffer.size for buffer in listed)
    if total >= _LARGEST_SUM:
        raise ValueError(f"the sizes sum to {total} bytes, expected less than 2**62")
    return listed


def _integer(name: str, value: int, at_least: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}, expected an integer") from None
    if number < at_least:
        raise ValueError(f"{name} is {number}, expected {at_least} or more")
    return number
