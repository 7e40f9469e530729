"""Which parameters hold state, and are updated, now."""

from __future__ import annotations

from memopt.optim.coverage.all import All
from memopt.optim.coverage.base import Coverage

__all__ = ["All", "Coverage"]
