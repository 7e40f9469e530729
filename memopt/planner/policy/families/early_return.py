"""A storage that a replay reads comes back with the replay."""

from __future__ import annotations

from memopt.planner.policy.program import Program


def add(program: Program) -> None:
    """For every resource r that groups G_1 to G_n call for together, and that follows resource q:

    y_r >= sum over groups of (sum of x_c over the group) - (n - 1),   y_r >= y_q.
    """
    for block in program.problem.blocks:
        for rule in block.together:
            if rule.variable not in program.resources:
                continue
            mine = program.resources[rule.variable]
            if rule.after is not None:
                program.add(program.total([(mine, 1.0), (program.resources[rule.after], -1.0)]) >= 0)
                continue
            terms = [(program.choices[c], -1.0) for group in rule.groups for c in group]
            program.add(program.total([(mine, 1.0), *terms]) >= 1 - len(rule.groups))
