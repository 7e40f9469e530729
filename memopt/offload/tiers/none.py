"""The tier of plans that swap nothing."""

from __future__ import annotations

import os

from torch import Tensor

from memopt.offload.errors import SwapError
from memopt.offload.tiers.tier import Slot, Tier


class NoTier(Tier):
    """Refuses everything."""

    def put(self, tensor: Tensor, moved_bytes: int | None = None) -> Slot:
        """Never possible."""
        raise SwapError("the plan swaps a storage but names no swap tier; plan with swap_tier 'host' or 'disk'")


def open_tier(folder: str | os.PathLike[str] | None, limit_bytes: int | None) -> NoTier:
    """The tier; both arguments are ignored."""
    return NoTier()
