"""Tensors among an operator's arguments: found, and replaced, in one fixed order."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor


class Places(NamedTuple):
    """How an operator was given its arguments, noted where another call is quickly seen to be given the same.

    Attributes:
        length: of the positional arguments.
        tensors: positions of tensors.
        others: (position, class, value) of what else decides the outputs' shapes.
        floats: positions of floats, which do not.
        names: keyword arguments.
    """

    length: int
    tensors: tuple[int, ...]
    others: tuple[tuple[int, type, Any], ...]
    floats: tuple[int, ...]
    names: dict[str, Any]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Places | None:
        """None where there are no tensors, or some are in lists or keywords."""
        tensors = tuple(n for n, value in enumerate(args) if isinstance(value, Tensor))
        if not tensors or len(operands(args, kwargs)) > len(tensors):
            return None
        if any(isinstance(value, (float, list, tuple)) for value in kwargs.values()):
            return None
        floats = tuple(n for n, value in enumerate(args) if type(value) is float)
        others = tuple(
            (n, type(value), list(value) if type(value) is list else value)
            for n, value in enumerate(args)
            if n not in tensors and n not in floats
        )
        return cls(len(args), tensors, others, floats, dict(kwargs))

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor] | None:
        """The tensors of another call, in order; None where it is not given its arguments in the same way."""
        if len(args) != self.length or kwargs != self.names:
            return None
        for n, kind, value in self.others:
            if type(args[n]) is not kind or args[n] != value:
                return None
        for n in self.floats:
            if type(args[n]) is not float:
                return None
        found = []
        for n in self.tensors:
            if not isinstance(args[n], Tensor):
                return None
            found.append(args[n])
        return found


def operands(args: Iterable[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among an operator's arguments, lists of tensors opened; in the order that ``with_operands`` takes."""
    found: list[Tensor] = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found.extend(item for item in value if isinstance(item, Tensor))
    return found


def with_operands(
    args: Iterable[Any], kwargs: dict[str, Any], new: Iterable[Any], kind: type = Tensor
) -> tuple[list[Any], dict[str, Any]]:
    """The same arguments with the tensors (or whatever is of that kind) replaced, in order."""
    source = iter(new)

    def one(value: Any) -> Any:
        if isinstance(value, kind):
            return next(source)
        if isinstance(value, (list, tuple)):
            return [next(source) if isinstance(item, kind) else item for item in value]
        return value

    return [one(value) for value in args], {name: one(value) for name, value in kwargs.items()} if kwargs else {}


def operands_and_constants(args: Iterable[Any], kwargs: dict[str, Any]) -> tuple[list[Tensor], list[Any]]:
    """The tensors among an operator's arguments, and what else decides its outputs' shapes.

    Floats do not, except where there are no tensors at all (``arange``), so that a constant which changes from step to
    step does not make an operation a different one.
    """
    tensors: list[Tensor] = []
    found: list[Any] = []
    floats = False
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, (list, tuple)):
            if value and type(value[0]) is int:  # sizes, strides: the most frequent, and never mixed with tensors
                found.append(list(value))
                continue
            tensors.extend(item for item in value if isinstance(item, Tensor))
            found.append([None if isinstance(item, Tensor) else item for item in value])
        else:
            floats = floats or isinstance(value, float)
            found.append(value)
    return tensors, [value for value in found if not isinstance(value, float)] if floats and tensors else found
