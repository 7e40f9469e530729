"""Each storage has exactly one fate."""

from __future__ import annotations

from memopt.planner.policy.program import Program


def add(program: Program) -> None:
    """For every item: the sum of x_c over its choices = 1."""
    for block in program.problem.blocks:
        for item in block.items:
            program.add(program.total((program.choices[c.variable], 1.0) for c in item.choices) == 1)
