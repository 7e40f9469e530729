"""Copies to and from the swap tier keep up with compute, or compute waits for them."""

from __future__ import annotations

from math import inf
from typing import Any

from memopt.planner.policy.program import Program


def add(program: Program) -> None:
    """Only where copies overlap compute. Times are seconds from the start of the step; tau_m is milestone m's.

    tau_m  = tau_(m-1) + compute_m + replays and codecs since then + stall_m
    out_k >= out_(k-1) + S_k / B_out     out_k >= tau_(k's forward end) - d_j + S_kj / B_out
    out_k <= tau_(k has left)            in_k  >= in_(k') + S_k / B_in
    in_k  >= out_k + S_k / B_in          in_k  >= tau_(k starts to return) + S_k / B_in
    in_k  <= tau_(k's backward start)

    with S_k the bytes that block k swaps, k' the block whose swaps return before k's, and for each of k's storages j
    S_kj the bytes of those that forward lets go no earlier than j, d_j seconds before the end of k's forward.
    """
    problem = program.problem
    if not problem.rates.overlap:
        return
    swapping = [
        k for k, block in enumerate(problem.blocks) if any(c.swap_bytes for i in block.items for c in i.choices)
    ]
    tau = _clock(program)
    out_rate = problem.rates.swap_out_bytes_per_second * program.unit_seconds
    in_rate = problem.rates.swap_in_bytes_per_second * program.unit_seconds
    out: dict[int, Any] = {}
    previous = None
    for k in sorted(swapping, key=lambda k: problem.blocks[k].moments.forward_stop):
        moments = problem.blocks[k].moments
        out[k] = program.continuous(f"out_{k}")
        _after(program, out[k], previous, _copy(program, k, out_rate))
        for lead in sorted({c.swap_lead_seconds for i in problem.blocks[k].items for c in i.choices if c.swap_bytes}):
            late = _copy(program, k, out_rate, lead)
            _after(program, out[k], tau[moments.forward_stop], late, lead / program.unit_seconds)
        program.add(out[k] <= tau[moments.leave])
        previous = out[k]
    previous = None
    for k in sorted(swapping, key=lambda k: problem.blocks[k].moments.backward_start):
        moments = problem.blocks[k].moments
        back = program.continuous(f"in_{k}")
        for start in (previous, tau[moments.arrive], out[k]):
            _after(program, back, start, _copy(program, k, in_rate))
        program.add(back <= tau[moments.backward_start])
        previous = back


def _copy(program: Program, k: int, rate: float, lead: float = inf) -> list[tuple[Any, float]]:
    """Minus the time for copying what block k swaps; with ``lead`` only what forward lets go of that late."""
    choices = [c for i in program.problem.blocks[k].items for c in i.choices if c.swap_bytes]
    return [(program.choices[c.variable], -c.swap_bytes / rate) for c in choices if c.swap_lead_seconds <= lead]


def _after(program: Program, end: Any, start: Any, copy: list[tuple[Any, float]], lead: float = 0.0) -> None:
    if start is not None:
        program.add(program.total([(end, 1.0), (start, -1.0), *copy]) >= -lead)


def _clock(program: Program) -> dict[int, Any]:
    """The milestones' times; a block's replays and codecs pass before the milestone that follows its backward start."""
    problem, unit = program.problem, program.unit_seconds
    tau: dict[int, Any] = {}
    previous, before = None, -1
    for m, milestone in enumerate(problem.milestones):
        now = program.continuous(f"tau_{m}")
        stall = program.continuous(f"stall_{m}")
        program.stalls.append(stall)
        work = [
            term
            for block in problem.blocks
            if before <= block.moments.backward_start < milestone.time
            for term in program.extra_seconds(block)
        ]
        terms = [(now, 1.0), (stall, -1.0), *((variable, -seconds) for variable, seconds in work)]
        if previous is not None:
            terms.append((previous, -1.0))
        program.add(program.total(terms) == milestone.seconds / unit)
        tau[milestone.time] = now
        previous, before = now, milestone.time
    return tau
