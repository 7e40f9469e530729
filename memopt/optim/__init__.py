"""Optimizers: rules x state formats x coverage. Every rule in ``memopt/optim/rules`` is offered here by its name."""

from __future__ import annotations

from typing import Any

from memopt.deprecation import missing
from memopt.optim.conversion import convert
from memopt.optim.coverage.block_coordinate import BlockCoordinate
from memopt.optim.coverage.lowrank_dct import LowRankDCT
from memopt.optim.coverage.split import Split
from memopt.optim.formats import StateFormat
from memopt.optim.gradient_release import release_gradients
from memopt.optim.optimizer import RuleOptimizer
from memopt.optim.registry import make, optimizers
from memopt.optim.sharpness import blockwise_lr
from memopt.optim.zeroth_order import ZerothOrder

globals().update(optimizers())

__all__ = ["BlockCoordinate", "LowRankDCT", "RuleOptimizer", "Split", "StateFormat", "ZerothOrder", "convert", "make"]
__all__ += ["blockwise_lr", "release_gradients"]
__all__ += optimizers()
__all__.sort()


def __getattr__(name: str) -> Any:
    return missing(__name__, name, __all__)
