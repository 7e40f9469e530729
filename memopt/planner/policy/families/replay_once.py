"""An operation that several replays need runs once, and an input that a replay reads stays alive until then."""

from __future__ import annotations

from memopt.planner.policy.program import Program


def add(program: Program) -> None:
    """For every choice c and every resource r that it needs: y_r >= x_c."""
    for choice in program.all_choices():
        for need in choice.needs:
            if need in program.resources:
                program.add(
                    program.total([(program.resources[need], 1.0), (program.choices[choice.variable], -1.0)]) >= 0
                )
