"""Turning points between neighbouring values, as float32 numbers that decide exactly."""

from __future__ import annotations

import functools
import itertools

import torch


@functools.cache
def turning_points(levels: tuple[float, ...]) -> tuple[float, ...]:
    """For each pair of neighbours the largest float32 not above their middle, so that ``a >`` it decides exactly."""
    return tuple(_rounded_down((low + high) / 2) for low, high in itertools.pairwise(levels))


def below(x: float) -> float:
    """The float32 next below x."""
    return torch.nextafter(torch.tensor(x, dtype=torch.float32), torch.tensor(-torch.inf)).item()


def _rounded_down(x: float) -> float:
    near: float = torch.tensor(x, dtype=torch.float64).float().item()
    return near if near <= x else below(near)
