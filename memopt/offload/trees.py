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

    return [one(value) for value in args], {name: one(value) for name, value in kwargs.items()}


def constants(args: Iterable[Any], kwargs: dict[str, Any], floats: bool) -> list[Any]:
    """What is not a tensor among an operator's arguments; without ``floats``, which never decide a shape, if so asked."""
    found: list[Any] = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, (list, tuple)):
            found.append([None if isinstance(item, Tensor) else item for item in value])
        elif not isinstance(value, Tensor) and (floats or not isinstance(value, float)):
            found.append(value)
    return found


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor inside nested containers, and one level inside objects that are none."""
    found: list[Tensor] = []
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif hasattr(leaf, "__dict__") and not callable(leaf):
            found.extend(item for item in pytree.tree_leaves(dict(vars(leaf))) if isinstance(item, Tensor))
    return found


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same containers with ``function`` of every tensor."""
    return pytree.tree_map_only(Tensor, function, value)
