"""What a block call started from, so that its code can run again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from memopt.offload.ambient import Autocast, Generators, autocast_state
from memopt.offload.arguments import Arguments
from memopt.offload.handles import changed_in_place
from memopt.offload.partitioned import Partitioned


@dataclass
class Counts:
    """How often blocks were replayed, and how many of those replays had to run the whole block at once, and why."""

    replays: int = 0
    whole: int = 0
    reasons: set[str] = field(default_factory=set)


class Origin:
    """Inputs, surroundings and random state of one block call.

    Attributes:
        arguments: the inputs themselves, held until nothing is left to recompute.
        copies: outside storages as they were before the call overwrote them, by storage number.
        partitioned: the parameters among the block's that DeepSpeed partitions.
    """

    def __init__(
        self,
        block: nn.Module,
        parameters: list[nn.Parameter],
        where: str,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        counts: Counts,
        partitioned: tuple[Partitioned, ...] = (),
    ) -> None:
        self.counts, self.partitioned = counts, partitioned
        self.block, self.parameters, self.where, self.forward = block, parameters, where, forward
        self.arguments = Arguments(args, kwargs)
        self.training = block.training
        inputs = self.arguments.inputs
        device = self.arguments.held[inputs[0]].device.type if inputs else "cpu"
        self.autocast: Autocast = autocast_state(device)
        self.generators: Generators = ()
        self.states: list[Tensor] | None = None
        self.copies: dict[int, Tensor] = {}
        self._versions: list[tuple[int, int]] = []
        self._parameter_versions: list[int] = []

    def left(self) -> None:
        """Forward is over: from here on what is held must not change."""
        held = self.arguments.held
        self._versions = [(n, value._version) for n, value in enumerate(held) if isinstance(value, Tensor)]
        self._parameter_versions = [parameter._version for parameter in self.parameters]

    def overwritten(self) -> set[int]:
        """The storages of parameters that have been overwritten since forward (an optimizer that steps in backward)."""
        return {
            parameter.untyped_storage()._cdata
            for parameter, version in zip(self.parameters, self._parameter_versions, strict=True)
            if parameter._version != version
        }

    def check(self) -> None:
        """Refuse to replay from inputs that were overwritten since.

        Raises:
            RuntimeError: as autograd would.
        """
        held = self.arguments.held
        for n, version in self._versions:
            if held[n]._version != version:
                raise changed_in_place(self.where, held[n], version)
