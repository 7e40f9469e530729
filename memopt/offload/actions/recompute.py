"""Recompute: the tensor is dropped, and comes back from a selective replay of its block."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from memopt.offload.actions.saver import BlockCall, Saver
from memopt.planner.values import StorageAction


class Recompute(Saver):
    """Holds nothing but a promise to replay."""

    drops = True
    exact = False

    def save(self, call: BlockCall, number: int, tensor: Tensor) -> Any:
        """The promise, which holds no more than the layout."""
        return call.drop(number, tensor)


def make(action: StorageAction) -> Recompute:
    """The saver; there is nothing to choose."""
    return Recompute()
