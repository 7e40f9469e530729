"""Recompute: the tensor is dropped, and comes back from a selective replay of its block."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from memopt.offload.actions.saver import Saver
from memopt.offload.handles import Dropped
from memopt.planner.values import StorageAction


class Recompute(Saver):
    """Holds nothing but the layout."""

    drops = True
    exact = False

    def save(self, call: Any, number: int, tensor: Tensor) -> Dropped:
        """A promise to replay."""
        return Dropped(tensor, number, call.sessions)


def make(action: StorageAction) -> Recompute:
    """The saver; there is nothing to choose."""
    return Recompute()
