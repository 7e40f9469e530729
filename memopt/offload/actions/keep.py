"""Keep: the tensor stays where it is."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from memopt.offload.actions.saver import Saver
from memopt.offload.handles import Kept
from memopt.planner.values import StorageAction


class Keep(Saver):
    """Holds the tensor, and checks that nobody overwrites it."""

    passive = True

    def save(self, call: Any, number: int, tensor: Tensor) -> Kept:
        """The tensor itself."""
        return Kept(tensor, call.where)


def make(action: StorageAction) -> Keep:
    """The saver; there is nothing to choose."""
    return Keep()
