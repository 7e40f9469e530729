"""Activation checkpointing of every block: nothing is kept but the blocks' inputs (Chen et al. 2016)."""

from __future__ import annotations

from memopt.planner.baselines.whole_blocks import by_storage
from memopt.planner.devices import Rates
from memopt.planner.values import Action, BlockPlan, Trace


def choose(trace: Trace, rates: Rates, budget_bytes: int) -> tuple[BlockPlan, ...]:
    """Every saved storage of every block is recomputed, whatever the budget."""
    return by_storage(trace, lambda n, block, saved: {Action.RECOMPUTE: 1.0})
