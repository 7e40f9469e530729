"""What the program minimises: the seconds that the actions add to a step, and, far behind, the bytes swapped."""

from __future__ import annotations

from typing import Any

from memopt.planner.policy.program import Program

# The whole model's swap traffic weighs as much as this share of a step: enough to break ties, too little to matter.
TRAFFIC_WEIGHT = 1e-5


def seconds(program: Program) -> Any:
    """sum of seconds_c * x_c + sum of seconds_r * y_r + sum of stalls, as a share of the step's compute time."""
    terms = [term for block in program.problem.blocks for term in program.extra_seconds(block)]
    return program.total(terms + [(stall, 1.0) for stall in program.stalls])


def traffic(program: Program) -> Any:
    """Bytes swapped, as a share of all that could be."""
    swaps = [(program.choices[c.variable], float(c.swap_bytes)) for c in program.all_choices() if c.swap_bytes]
    whole = sum(size for _, size in swaps)
    return program.total((variable, size / whole) for variable, size in swaps)


def step_cost(program: Program) -> Any:
    """The objective of one solve: seconds + a weight * traffic."""
    return seconds(program) + TRAFFIC_WEIGHT * traffic(program)
