"""Random numbers of a replay: every operation draws exactly what it drew in forward, whichever others run.

The states of the generators at the block's start are known. The state before the n-th random operation is found by
having the operations before it consume their numbers: on the CPU on a dummy tensor of the same layout, on CUDA by
moving the generator's offset on. The generators are left as they were found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memopt.offload.ambient import Generators, random_states, set_random_states
from memopt.offload.template import Layout

if TYPE_CHECKING:
    from memopt.offload.replay.tape import Node, Tape

# What these draw depends on the layout of their operands only.
_DUMMY = frozenset(
    f"aten::{name}"
    for name in (
        "bernoulli_", "native_dropout", "normal_", "uniform_", "rand", "rand_like", "randn", "randn_like", "randint",
        "randint_like", "exponential_", "random_", "rrelu_with_noise",
    )
)  # fmt: skip


class Draws:
    """The random states of one call of a block.

    Args:
        generators: those that the block draws from.
        states: theirs at the block's start; None where nothing that draws is ever run again.
        offsets: for each random operation, by how much it moves a CUDA generator on.
    """

    def __init__(self, generators: Generators, states: list[Tensor] | None, offsets: list[int]) -> None:
        self._generators = generators
        self._states: list[list[Tensor]] = [] if states is None else [states]
        self._offsets = offsets
        self._numbers: dict[int, int] = {}

    def met(self, ordinal: int, number: int) -> None:
        """The n-th random operation is this node of the tape."""
        self._numbers[ordinal] = number

    def run(self, ordinal: int, operation: Callable[[], Any], tape: Tape) -> Any:
        """Run the n-th random operation from the state that it had in forward."""
        if not self._states:
            raise LookupError("random numbers that the first execution of the block did not draw")
        outside = random_states(self._generators)
        try:
            while len(self._states) <= ordinal:
                self._consume(len(self._states) - 1, tape)
            set_random_states(self._generators, self._states[ordinal])
            output = operation()
            if len(self._states) == ordinal + 1:
                self._states.append(random_states(self._generators))
            return output
        finally:
            set_random_states(self._generators, outside)

    def _consume(self, ordinal: int, tape: Tape) -> None:
        """Find the state after a random operation that itself need not run."""
        node = tape.nodes[self._numbers[ordinal]]
        set_random_states(self._generators, self._states[ordinal])
        if self._moved_on(node, ordinal):
            self._states.append(random_states(self._generators))
        elif node.func._schema.name in _DUMMY:
            args, kwargs = node.filled(_zeros(hole.layout) for hole in node.holes)
            if node.holes or not isinstance(next(iter(args), None), Tensor):
                node.func(*args, **kwargs)
            self._states.append(random_states(self._generators))
        else:
            # Draws depend on data: nothing short of running it tells how many.
            tape.run(self._numbers[ordinal])

    def _moved_on(self, node: Node, ordinal: int) -> bool:
        device = node.holes[0].layout.device if node.holes else torch.device("cpu")
        offset = self._offsets[ordinal] if ordinal < len(self._offsets) else 0
        if device.type != "cuda" or not offset or len(self._generators) != 1:
            return False
        generator = self._generators[0]
        generator.set_offset(generator.get_offset() + offset)
        return True


def _zeros(layout: Layout) -> Tensor:
    return torch.empty_strided(layout.size, layout.stride, dtype=layout.dtype, device=layout.device).zero_()
