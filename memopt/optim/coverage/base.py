"""What a coverage is: the optimizer asks it before every step which of the parameters with gradients to update."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Coverage(Protocol):
    """Decides which parameters hold state now. A parameter outside keeps no state and is left as it is."""

    def covers(self, number: int, param: Tensor) -> bool:
        """Whether the parameter, ``number``-th over all groups, is updated this step."""
