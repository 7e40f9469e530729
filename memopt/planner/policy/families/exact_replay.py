"""A lossy copy never feeds a replay."""

from __future__ import annotations

from memopt.planner.policy.program import Program
from memopt.planner.values import Action


def add(program: Program) -> None:
    """For every item s under a choice c that may not feed replays, and every item r whose replay reads s:

    x_c + x_(r, recompute) <= 1.
    """
    for block in program.problem.blocks:
        recompute = {
            item.index: c.variable for item in block.items for c in item.choices if c.action is Action.RECOMPUTE
        }
        for item in block.items:
            lossy = [(program.choices[c.variable], 1.0) for c in item.choices if not c.feeds]
            if not lossy:
                continue
            for reader in item.readers:
                if reader in recompute:
                    program.add(program.total([*lossy, (program.choices[recompute[reader]], 1.0)]) <= 1)
