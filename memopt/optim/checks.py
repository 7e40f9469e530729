"""Checks of a group's options: ``ValueError`` or ``TypeError`` naming the option, its value and what is wanted."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

Group = Mapping[str, Any]

_LARGEST = sys.float_info.max


_KERNEL_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def ordered(params: Any) -> list[Any]:
    """``params`` as a list.

    Raises:
        TypeError: it is no collection, or one without an order.
    """
    if isinstance(params, torch.Tensor):
        return [params]
    if isinstance(params, set) or not isinstance(params, Iterable):
        raise TypeError(
            f"params is a {type(params).__name__}; it must be an iterable of parameters, of (name, parameter) pairs or "
            "of groups, whose order does not change between runs"
        )
    return list(params)


def dtype(param: torch.Tensor, name: str, optimizer: str) -> None:
    """The parameter is of a type that the kernels take."""
    if param.dtype not in _KERNEL_TYPES:
        advice = " (view a complex one with torch.view_as_real)" if param.is_complex() else ""
        raise ValueError(
            f"{name} is of {param.dtype}; {optimizer} takes real floating-point parameters of 32 or 16 bits{advice}"
        )


def number(value: Any, name: str, accepts: Callable[[float], bool], wanted: str) -> float:
    """``value`` as a float if it is a real number (or a tensor of one element) that ``accepts`` takes."""
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} is a tensor of shape {tuple(value.shape)}; it must have exactly one element")
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}; it must be {wanted}")
    if not abs(value) <= _LARGEST or not accepts(value):
        raise ValueError(f"{name} is {value!r}; it must be {wanted}")
    return float(value)


def non_negative(group: Group, *names: str) -> None:
    """Each named option is a finite number of at least 0."""
    for name in names:
        number(group[name], name, lambda v: 0 <= v < math.inf, "a finite number of at least 0")


def positive(group: Group, *names: str) -> None:
    """Each named option is a finite number above 0."""
    for name in names:
        number(group[name], name, lambda v: 0 < v < math.inf, "a finite number above 0")


def fraction(group: Group, *names: str) -> None:
    """Each named option lies in [0, 1)."""
    for name in names:
        number(group[name], name, lambda v: 0 <= v < 1, "a number from 0 up to, not including, 1")


def fractions(group: Group, name: str, count: int) -> None:
    """The named option is a sequence of ``count`` numbers in [0, 1), as ``betas`` are."""
    numbers(group, name, count, lambda v: 0 <= v < 1, "numbers from 0 up to, not including, 1")


def numbers(group: Group, name: str, count: int, accepts: Callable[[float], bool], wanted: str) -> None:
    """The named option is a sequence of ``count`` numbers that ``accepts`` takes."""
    values = group[name]
    if not isinstance(values, (tuple, list)) or len(values) != count:
        raise ValueError(f"{name} is {values!r}; it must be {count} {wanted}")
    for i, value in enumerate(values):
        number(value, f"{name}[{i}]", accepts, f"one of {count} {wanted}")


def flag(group: Group, *names: str) -> None:
    """Each named option is a bool."""
    for name in names:
        if not isinstance(group[name], bool):
            raise TypeError(f"{name} is {group[name]!r}; it must be True or False")


def whole(group: Group, *names: str, minimum: int = 0, maximum: int | None = None) -> None:
    """Each named option is an int of at least ``minimum`` and, where one is given, at most ``maximum``."""
    for name in names:
        value = group[name]
        high = isinstance(value, int) and maximum is not None and value > maximum
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum or high:
            span = f"of at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
            raise ValueError(f"{name} is {value!r}; it must be a whole number {span}")


def one_of(group: Group, name: str, choices: tuple[Any, ...]) -> None:
    """The named option is one of ``choices``."""
    if not any(isinstance(group[name], type(c)) and group[name] == c for c in choices):
        listed = ", ".join(repr(c) for c in choices)
        raise ValueError(f"{name} is {group[name]!r}; it must be one of {listed}")


def decay(group: Group) -> dict[str, float]:
    """Weight decay as two scalars: ``l2``, its part in the gradient, and ``keep``, what stays of the parameter."""
    amount = float(group["weight_decay"])
    if group["decoupled_weight_decay"]:
        return {"l2": 0.0, "keep": 1.0 - float(group["lr"]) * amount}
    return {"l2": amount, "keep": 1.0}
