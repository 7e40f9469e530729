"""Keep: the tensor stays where it is."""

from __future__ import annotations

from torch import Tensor

from memopt.offload.actions.saver import BlockCall, Saver
from memopt.offload.handles import Kept
from memopt.planner.values import StorageAction


class Keep(Saver):
    """Holds the tensor, and checks that nobody overwrites it."""

    passive = True

    def save(self, call: BlockCall, number: int, tensor: Tensor) -> Kept:
        """The tensor itself."""
        return Kept(tensor, call.where)


def make(action: StorageAction) -> Keep:
    """The saver; there is nothing to choose."""
    return Keep()
