"""What is swapped at the same time fits where it is swapped to."""

from __future__ import annotations

from memopt.planner.policy.program import Program


def add(program: Program) -> None:
    """When each block's forward ends: the sum over all blocks whose swaps are away of swap_c * x_c <= room."""
    problem, unit = program.problem, program.unit_bytes
    swaps = [
        [
            (program.choices[c.variable], c.swap_bytes / unit)
            for item in block.items
            for c in item.choices
            if c.swap_bytes
        ]
        for block in problem.blocks
    ]
    ends = sorted({block.moments.forward_stop for block in problem.blocks})
    seen: set[tuple[int, ...]] = set()
    for time in ends:
        away = tuple(
            k
            for k, block in enumerate(problem.blocks)
            if block.moments.forward_stop <= time < block.moments.backward_start
        )
        if not any(swaps[k] for k in away) or any(set(away) <= set(other) for other in seen):
            continue
        seen.add(away)
        terms = [term for k in away for term in swaps[k]]
        if sum(size for _, size in terms) > problem.rates.host_bytes / unit:
            program.add(program.total(terms) <= problem.rates.host_bytes / unit)
