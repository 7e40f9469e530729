"""What an action must offer."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from memopt.offload.handles import Kept, Leaving, Stored
from memopt.offload.tiers import Tier


class BlockCall(Protocol):
    """What an action sees of the block call that saves.

    Attributes:
        where: the block, for messages.
        tier: where swapped storages go.
        stored: what actions have moved in this call, by saved storage.
        leaving: tensors over inputs that go when the call's forward has ended, each with the action that moves it.
    """

    where: str
    tier: Tier
    stored: dict[int, Stored]
    leaving: list[tuple[Any, Leaving]]

    def storage_of(self, number: int) -> int:
        """Which of the saved storages a saved tensor lies over."""

    def signs_only(self, number: int) -> bool:
        """Whether backward needs only the signs of a saved tensor."""

    def drop(self, number: int, tensor: Tensor) -> Any:
        """The promise that a replay of the call brings a saved tensor back."""


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

    def save(self, call: BlockCall, number: int, tensor: Tensor) -> Any:
        """What autograd holds for the call's ``number``-th saved tensor; it has ``unpack()``."""
        raise NotImplementedError

    def save_input(self, call: BlockCall, tensor: Tensor) -> Any:
        """The same for a tensor over one of the block's inputs, which others may hold too; by default it is kept."""
        return Kept(tensor, call.where)
