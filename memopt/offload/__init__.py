"""Carries a plan out."""

from memopt.offload.applying import Handle, apply
from memopt.offload.errors import PlanMismatchError, ReplayError, SwapError, UnsupportedBlockError

__all__ = ["Handle", "PlanMismatchError", "ReplayError", "SwapError", "UnsupportedBlockError", "apply"]
