"""What the parts of an optimizer ask of the whole: what they are written against, so that they need not import it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from torch import Tensor

from memopt.kernels import State
from memopt.optim.coverage.base import Coverage
from memopt.optim.slot import Slot


class Owner(Protocol):
    """A rule's optimizer (:class:`memopt.optim.RuleOptimizer`) as its gathering, checkpoints and scaling see it."""

    elementwise: ClassVar[bool]
    optional: ClassVar[tuple[State, ...]]
    param_groups: list[dict[str, Any]]
    state: defaultdict[Tensor, Any]
    coverage: Coverage
    numbering: Mapping[Tensor, int] | None

    def slot(self, number: int, group: Mapping[str, Any], param: Tensor, stored: dict[str, Any]) -> Slot:
        """How a parameter's states are kept."""

    def complete(self, slot: Slot, group: Mapping[str, Any]) -> bool:
        """Allocate the states that a parameter lacks; whether it lacked one."""

    def grad_factor(self, group: Mapping[str, Any]) -> float:
        """What rules multiply gradients by."""

    def _check_options(self, group: Mapping[str, Any]) -> None:
        """Raise where an option in the group is wrong."""
