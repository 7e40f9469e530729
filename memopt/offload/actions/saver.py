"""What an action must offer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from memopt.offload.handles import Kept

if TYPE_CHECKING:
    from memopt.offload.calls import Call


class Saver:
    """Saves the tensors over one storage of a block call.

    Attributes:
        drops: the value is gone and must be replayed.
        exact: what comes back has the same bits, so that a replay may read it.
        passive: nothing is done at all.
    """

    drops = False
    exact = True
    passive = False

    def save(self, call: Call, number: int, tensor: Tensor) -> Any:
        """What autograd holds for the call's ``number``-th saved tensor; it has ``unpack()``."""
        raise NotImplementedError

    def save_input(self, call: Call, tensor: Tensor) -> Any:
        """The same for a tensor over one of the block's inputs, which others may hold too; by default it is kept."""
        return Kept(tensor, call.where)
