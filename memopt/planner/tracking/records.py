"""What a tracker writes down: storages, operations, and the rules that name a storage's size and category."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from memopt.planner.values import Category, Phase

Scratch = Callable[[tuple[Any, ...], dict[str, Any]], int]
_SCRATCH: dict[str, Scratch] = {}

_CUDA_ROUNDING = 512

_RANK = {
    Category.TEMPORARIES: 0,
    Category.ACTIVATIONS: 1,
    Category.LOGITS: 2,
    Category.GRADIENTS: 3,
    Category.OPTIMIZER: 4,
    Category.WEIGHTS: 5,
}


def register_scratch(name: str, scratch_bytes: Scratch) -> None:
    """States the scratch of an operation, for traces, where its kernel does not run.

    Args:
        name: qualified name, such as ``"memopt::linear_cross_entropy"``.
        scratch_bytes: from the operation's (args, kwargs) to the largest number of bytes that its kernel holds at once
            beside its outputs.
    """
    _SCRATCH[name] = scratch_bytes


def scratch_bytes(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The stated scratch of a call of an operation; 0 where none is stated."""
    rule = _SCRATCH.get(name)
    return 0 if rule is None else rule(args, kwargs)


def rounded_bytes(size: int, device: str) -> int:
    """The bytes that an allocation of ``size`` takes: multiples of 512 on CUDA devices, the size itself elsewhere."""
    return -(-size // _CUDA_ROUNDING) * _CUDA_ROUNDING if device == "cuda" else size


@dataclass(eq=False)
class Record:
    """One storage while and after it lived; ``category`` is set where an event has already decided it."""

    id: int
    bytes: int
    birth: int
    death: int | None
    producer: int | None
    name: str
    device: str
    category: Category | None = None
    watch: Any = field(default=None, repr=False)


@dataclass
class History:
    """What happened, operation by operation, to whoever reads the tracker afterwards."""

    names: list[str] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    backward_starts: list[int] = field(default_factory=list)
    logit_gradients: list[tuple[int, int]] = field(default_factory=list)


def claim(record: Record, category: Category) -> None:
    """Gives a storage a category unless a stronger one holds it already."""
    if record.category is None or _RANK[category] > _RANK[record.category]:
        record.category = category


def tensors_in(value: Any, depth: int = 8) -> Iterator[Tensor]:
    """Every tensor inside nested tuples, lists, dicts and dataclass-like objects, tensor subclasses taken apart."""
    if isinstance(value, Tensor):
        if is_traceable_wrapper_subclass(value):
            for name in value.__tensor_flatten__()[0]:
                yield from tensors_in(getattr(value, name), depth - 1)
        else:
            yield value
    elif depth > 0:
        if isinstance(value, (tuple, list)):
            for item in value:
                yield from tensors_in(item, depth - 1)
        elif isinstance(value, dict):
            for item in value.values():
                yield from tensors_in(item, depth - 1)
        elif hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
            for name in value.__dataclass_fields__:
                yield from tensors_in(getattr(value, name, None), depth - 1)
