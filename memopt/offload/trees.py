"""Tensors inside arguments: found, and replaced, in one fixed order."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


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
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, (list, tuple)):
            tensors.extend(item for item in value if isinstance(item, Tensor))
            found.append([None if isinstance(item, Tensor) else item for item in value])
        else:
            found.append(value)
    return tensors, [value for value in found if not isinstance(value, float)] if tensors else found


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor inside nested containers, and one level inside objects that are none."""
    found: list[Tensor] = []
    if type(value) is tuple and all(isinstance(item, Tensor) or item is None for item in value):
        return [item for item in value if item is not None]
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif hasattr(leaf, "__dict__") and not callable(leaf):
            found.extend(item for item in pytree.tree_leaves(dict(vars(leaf))) if isinstance(item, Tensor))
    return found


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same containers with ``function`` of every tensor."""
    if type(value) is tuple:
        return tuple(map_tensors(function, item) for item in value)
    if value is None or isinstance(value, Tensor):
        return None if value is None else function(value)
    if value == {}:
        return {}
    return pytree.tree_map_only(Tensor, function, value)
