"""The arguments of a block call as they were when it began, so that its code can run again on the same.

Containers are copied, and so are ordinary Python objects, with what hangs below them: a key and value cache that the
block appends to, or a list that it extends, is in its replay as it was at the call, and the caller's own stays as the
forward left it. Tensors are not copied.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from memopt.offload.handles import Piece, Stored
from memopt.offload.template import Layout

_REAL = (Tensor, nn.Parameter)
_ATOMS = frozenset(
    {type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type(Ellipsis)}
)
# Set for classes written in Python; others may hold more than their attributes.
_HEAP = 1 << 9
# An argument that leads to more than this (a data loader, say) is passed on as it is from there on.
_LIMIT = 20_000


class Absent:
    """A tensor that the call did not read: its shape is known, its data is not held."""

    __slots__ = ("layout", "requires_grad")

    def __init__(self, tensor: Tensor) -> None:
        self.layout, self.requires_grad = Layout.of(tensor), tensor.requires_grad


class Away:
    """An input whose storage waits in a tier."""

    __slots__ = ("_piece", "requires_grad", "stored")

    def __init__(self, stored: Stored, tensor: Tensor) -> None:
        self.stored, self._piece, self.requires_grad = stored, Piece(stored, tensor), tensor.requires_grad

    def tensor(self) -> Tensor:
        """The tensor, brought back; ``release`` it when the replay is over."""
        return self._piece.begin()

    def release(self) -> None:
        """The replay does not need it any more."""
        self.stored.handed(self._piece.number)


class _Place:
    """Where a tensor stands in the copied arguments."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number


class Arguments:
    """Positional and keyword arguments of one call.

    Attributes:
        held: every tensor among them, in one fixed order; a list of whole tensors, ``Absent`` and ``Away`` ones.
        inputs: places in ``held`` of the block's inputs: the plain tensors in containers and, one level deep, objects.
    """

    __slots__ = ("_tree", "held", "inputs")

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._tree: Any = None
        if not kwargs and all(value is None or isinstance(value, Tensor) for value in args):
            self.held: list[Any] = list(args)
            self.inputs = [n for n, value in enumerate(args) if type(value) in _REAL]
            return
        self.held, self.inputs = [], []
        places: dict[int, _Place] = {}

        def place(tensor: Tensor, depth: int) -> _Place:
            found = places.get(id(tensor))
            if found is None:
                found = places[id(tensor)] = _Place(len(self.held))
                self.held.append(tensor)
            if depth <= 1 and type(tensor) in _REAL and found.number not in self.inputs:
                self.inputs.append(found.number)
            return found

        self._tree = _Copier(Tensor, place).copy((args, kwargs), 0)

    def tensors(self) -> list[Tensor]:
        """The inputs, before any of them has gone."""
        return [self.held[n] for n in self.inputs]

    def again(self, one: Callable[[int, Any], Any]) -> tuple[Any, Any]:
        """Fresh copies of the arguments, with ``one(place, held)`` for every tensor."""
        if self._tree is None:
            return tuple(None if value is None else one(n, value) for n, value in enumerate(self.held)), {}
        made: dict[int, Any] = {}

        def tensor(place: _Place, depth: int) -> Any:
            if place.number not in made:
                made[place.number] = one(place.number, self.held[place.number])
            return made[place.number]

        args, kwargs = _Copier(_Place, tensor).copy(self._tree, 0)
        return args, kwargs

    def read(self, touched: Callable[[Tensor], bool]) -> frozenset[int]:
        """Places of the tensors that a replay may read: the inputs, and what the call has touched."""
        inputs = set(self.inputs)
        return frozenset(n for n, value in enumerate(self.held) if n in inputs or value is None or touched(value))

    def forget(self, count: int, read: frozenset[int]) -> None:
        """Let go of the tensors that a call like this one, with ``count`` tensors, does not read."""
        if len(self.held) == count and len(read) < count:
            for n, value in enumerate(self.held):
                if n not in read:
                    self.held[n] = Absent(value)

    def leave(self, stored: Stored) -> None:
        """Let go of the tensors over a storage that has been moved."""
        for n, value in enumerate(self.held):
            if isinstance(value, Tensor) and stored.is_of(value):
                self.held[n] = Away(stored, value)


class _Copier:
    """Copies containers and ordinary objects; ``leaf(value, depth)`` replaces values of the kind ``kind``."""

    def __init__(self, kind: type, leaf: Callable[[Any, int], Any]) -> None:
        self._kind, self._leaf = kind, leaf
        self._memo: dict[int, Any] = {}

    def copy(self, value: Any, depth: int) -> Any:
        """The copy; ``depth`` counts the objects that are no containers above it."""
        kind: Any = type(value)
        if kind in _ATOMS:
            return value
        if isinstance(value, self._kind):
            return self._leaf(value, depth)
        if id(value) in self._memo:
            return self._memo[id(value)]
        if len(self._memo) > _LIMIT:
            return value
        if kind is tuple:
            made: Any = tuple([self.copy(item, depth) for item in value])
            self._memo[id(value)] = made
        elif kind is list:
            made = self._memo[id(value)] = []
            made.extend([self.copy(item, depth) for item in value])
        elif kind is dict:
            made = self._memo[id(value)] = {}
            made.update({key: self.copy(item, depth) for key, item in value.items()})
        elif kind is set:
            made = self._memo[id(value)] = set(value)
        elif (slots := _slots_of(kind)) is not None:
            if not slots and not getattr(value, "__dict__", None):
                return value  # a mark, known by its identity
            made = self._memo[id(value)] = object.__new__(kind)
            for name in slots:
                if hasattr(value, name):
                    object.__setattr__(made, name, self.copy(getattr(value, name), depth + 1))
            if hasattr(value, "__dict__"):
                made.__dict__.update({name: self.copy(item, depth + 1) for name, item in vars(value).items()})
        elif kind in pytree.SUPPORTED_NODES or pytree.is_namedtuple_class(kind):
            items, context = pytree.tree_flatten(value, is_leaf=lambda item: item is not value)
            made = self._memo[id(value)] = pytree.tree_unflatten([self.copy(item, depth) for item in items], context)
        else:
            return value
        return made


@functools.cache
def _slots_of(kind: Any) -> tuple[str, ...] | None:
    """The slots of an ordinary class, whose objects are no more than their attributes; None for any other class."""
    unlike = (nn.Module, torch.optim.Optimizer, BaseException, Enum, type)
    if issubclass(kind, unlike) or kind in pytree.SUPPORTED_NODES:
        return None
    if kind.__new__ is not object.__new__ or kind.__reduce_ex__ is not object.__reduce_ex__:
        return None
    found: list[str] = []
    for base in kind.__mro__[:-1]:
        if "__call__" in base.__dict__ or not base.__flags__ & _HEAP:
            return None
        slots = base.__dict__.get("__slots__", ())
        found += [slots] if isinstance(slots, str) else slots
    return tuple(name for name in found if name not in ("__dict__", "__weakref__"))
