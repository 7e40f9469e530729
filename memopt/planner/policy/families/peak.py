"""The step fits in memory at every position of forward, loss, backward and optimizer step."""

from __future__ import annotations

from typing import Any

from memopt.planner.policy.program import Program


def add(program: Program) -> None:
    """For every position p with quiet blocks a to b, terms (v, bytes) and fixed bytes F_p:

    F_p + H_b - H_a + sum over terms of bytes * v <= budget,
    where H_0 = 0 and H_(k+1) = H_k + sum over choices c and resources r of block k of held_c * x_c + held_r * y_r.

    Where the smallest budget is sought, the budget is the variable ``peak``.
    """
    problem, unit = program.problem, program.unit_bytes
    needed = {end for position in problem.positions for end in position.quiet if end}
    held: list[Any] = [None]
    for k, block in enumerate(problem.blocks[: max(needed, default=0)]):
        held.append(program.continuous(f"held_{k + 1}"))
        terms = [
            (program.choices[c.variable], -c.held_bytes / unit)
            for item in block.items
            for c in item.choices
            if c.held_bytes
        ]
        terms += [(program.resources[r.variable], -r.held_bytes / unit) for r in block.resources if r.held_bytes]
        before = [(held[k], -1.0)] if k else []
        program.add(program.total([(held[k + 1], 1.0), *before, *terms]) == 0)
    for position in problem.positions:
        first, last = position.quiet
        terms = [(program.value(variable), size / unit) for variable, size in position.terms]
        if first < last:
            terms += [(held[last], 1.0)] + ([(held[first], -1.0)] if first else [])
        if program.peak is not None:
            program.add(program.total([*terms, (program.peak, -1.0)]) <= -position.fixed_bytes / unit)
        else:
            program.add(program.total(terms) <= (problem.budget_bytes - position.fixed_bytes) / unit)
