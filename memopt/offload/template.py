"""What one block call does, as its first real execution showed it: operations, storages, saved tensors.

A *value* is a storage at one write version. All numbers below count within the call: operations and saved tensors
("packs") in the order in which they happened, storages in the order in which they were first seen.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from memopt.offload.trees import Places

if TYPE_CHECKING:
    from memopt.offload.partitioned import Partitioned

Value = tuple[int, int]


class Kind(Enum):
    """Where a storage of a block call comes from."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    INPUT = "input"
    OUTSIDE = "outside"
    MADE = "made"


class Layout(NamedTuple):
    """How a tensor lies over its storage."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Layout:
        """The layout of a tensor."""
        return cls(tensor.shape, tensor.stride(), int(tensor.storage_offset()), tensor.dtype, tensor.device)

    def over(self, base: torch.Tensor) -> torch.Tensor:
        """The tensor of this layout over the storage of ``base``; same bytes, exact strides."""
        if base.dtype != self.dtype:
            plain = torch.empty(0, dtype=self.dtype, device=base.device)
            return plain.set_(base.untyped_storage(), self.offset, self.size, self.stride)
        if base.shape == self.size and base.stride() == self.stride and base.storage_offset() == self.offset:
            return base
        return base.as_strided(self.size, self.stride, self.offset)


@dataclass(frozen=True)
class Output:
    """One output of an operation: fresh storage, another name for input ``position``'s, that input itself, or data."""

    fresh: bool = False
    position: int | None = None
    same_object: bool = False
    layout: Layout | None = None
    constant: Any = None


@dataclass(frozen=True)
class OpTemplate:
    """One operation as the first execution saw it; equal layouts within a template are one object."""

    func: Any
    layouts: tuple[Layout | None, ...]
    constants: list[Any]
    reads: tuple[Value, ...]
    outputs: tuple[Output, ...]
    container: type | None
    made: tuple[Value, ...]
    written: tuple[int, ...]
    random: bool
    rng_offset: int
    forced: bool
    graded: bool
    places: Places | None = None

    @cached_property
    def renames(self) -> int | None:
        """The operand that the one output is another name for, where the operation does nothing else."""
        output = self.outputs[0] if len(self.outputs) == 1 else None
        if output is None or output.fresh or output.layout is None or self.container is not None or self.written:
            return None
        return output.position or 0


@dataclass(frozen=True)
class Pack:
    """One saved tensor: the value, and which of the call's saved storages, or saved inputs, it is (-1: none)."""

    value: Value
    saved: int
    input: int = -1


@dataclass
class Template:
    """Everything about one call of a block that its plan needs to know.

    Attributes:
        ops, kinds, sizes: the operations, and each storage's origin and bytes.
        packs: the saved tensors; ``saved`` are the distinct saved storages, in order of first pack, without parameters,
            buffers and the block's inputs; ``saved_inputs`` the same for its inputs.
        arguments: how many tensors the arguments held, and the places of those that the call read.
        versions: how often each storage was written.
        owners: saved tensors that lie over a partitioned parameter, and which.
        outside_names: for storages that are buffers or inputs, where they hang: ("buffer", path) or ("input", n).
        opaque: a reason why values cannot be told apart; the block is then replayed as a whole.
        generators: the random generators that the block draws from.
    """

    ops: list[OpTemplate] = field(default_factory=list)
    kinds: list[Kind] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    packs: list[Pack] = field(default_factory=list)
    saved: list[int] = field(default_factory=list)
    saved_inputs: list[int] = field(default_factory=list)
    arguments: tuple[int, frozenset[int]] = (0, frozenset())
    versions: list[int] = field(default_factory=list)
    outside_names: dict[int, tuple[str, Any]] = field(default_factory=dict)
    opaque: str | None = None
    generators: tuple[torch.Generator, ...] = ()
    signature: str = ""
    owners: dict[int, Partitioned] = field(default_factory=dict)

    def births(self) -> dict[int, tuple[int, int]]:
        """For each storage made in the call: the operation that makes it, and which of its outputs it is."""
        found: dict[int, tuple[int, int]] = {}
        for number, op in enumerate(self.ops):
            for place, (storage, version) in enumerate(op.made):
                if version == 0:
                    found[storage] = (number, place)
        return found

    @cached_property
    def signs_only(self) -> frozenset[int]:
        """Saved tensors of which backward needs the signs only: a ReLU's output that nothing else saves."""
        makers = {value: op for op in self.ops for value in op.made}
        packs = Counter(pack.value[0] for pack in self.packs)
        found = set()
        for number, pack in enumerate(self.packs):
            op = makers.get(pack.value)
            # A ReLU of something that requires gradients saves its own output: the one pack there is.
            if op and op.graded and packs[pack.value[0]] == 1 and op.func._schema.name in ("aten::relu", "aten::relu_"):
                found.add(number)
        return frozenset(found)

    @cached_property
    def mutated_outside(self) -> list[int]:
        """Storages from outside that the call writes."""
        return [s for s, kind in enumerate(self.kinds) if kind is not Kind.MADE and self.versions[s] > 0]
