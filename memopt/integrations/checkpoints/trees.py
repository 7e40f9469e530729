"""State dicts taken apart into named tensors and the plain values around them, and put together again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


def take_apart(tree: Any) -> tuple[dict[str, Tensor], Any]:
    """The tensors of nested dicts, lists and tuples by path (``state/0/exp_avg``), and the rest with None for them.

    Raises:
        ValueError: two tensors would have the same path, because of a key that is a number and its text.
    """
    tensors: dict[str, Tensor] = {}

    def take(name: str, tensor: Tensor) -> None:
        if name in tensors:
            raise ValueError(f"two tensors of the state dict are called {name!r}: keys differ only by their type")
        tensors[name] = tensor

    return tensors, _walk(tree, "", lambda name, value: take(name, value) if isinstance(value, Tensor) else value)


def put_together(rest: Any, tensors: Mapping[str, Tensor], file: object) -> Any:
    """The state dict that :func:`take_apart` took apart; ``file`` is where the tensors are from, for the message.

    Raises:
        ValueError: a tensor has no place in it.
    """
    homeless = set(tensors)

    def put(name: str, value: Any) -> Any:
        homeless.discard(name)
        return tensors.get(name) if value is None else value

    whole = _walk(rest, "", put)
    if homeless:
        raise ValueError(f"{file} holds {min(homeless)!r}, for which its state dict has no place")
    return whole


def _walk(tree: Any, path: str, leaf: Callable[[str, Any], Any]) -> Any:
    def under(key: object, value: Any) -> Any:
        return _walk(value, f"{path}/{key}" if path else str(key), leaf)

    if isinstance(tree, Mapping):
        return {key: under(key, value) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(under(i, value) for i, value in enumerate(tree))
    return leaf(path, tree)
