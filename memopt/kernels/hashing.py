"""Random numbers for stochastic rounding: a counter-based hash, so that nothing is stored and shards agree.

The 32-bit word of an element is a function of (seed, step, parameter number, draw, global element index) alone. One
word serves two states: slot ``j`` is the word of draw ``j // 2``, turned by 16 bits when ``j`` is odd. As a signed
integer it is the noise of a codec (the uniform is ``1/2 + word / 2**32``, and its upper 16 bits, which decide, are the
lower ones of the other slot); its upper 16 bits are the noise of a bfloat16.

The global index of an element is that of its row's first element plus its place in the row; the index's upper 32 bits
are taken at the start of the row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF
MASK64 = 0xFFFFFFFFFFFFFFFF
GOLDEN32, M1 = 0x9E3779B1, 0x85EBCA6B
GOLDEN64 = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Rounding:
    """How a tensor is rounded: ``"nearest"`` or ``"stochastic"``, and what the random numbers depend on."""

    kind: str = "nearest"
    seed: int = 0
    step: int = 0
    number: int = 0
    offset: int = 0  # the global index of the first element


def mix64(x: int) -> int:
    """The output function of SplitMix64, on Python integers."""
    x = (x + GOLDEN64) & MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def base_key(seed: int, step: int, number: int) -> int:
    """The 64-bit key of one parameter in one step."""
    return mix64(step_key(seed, step) ^ (number & MASK64))


def step_key(seed: int, step: int) -> int:
    """What the keys of all parameters share in one step."""
    return mix64(mix64(seed & MASK64) ^ (step & MASK64))


def row_keys(base: int, row_start: int, draw: int) -> tuple[int, int]:
    """The two 32-bit keys of a row whose first element has the global index ``row_start``."""
    key = mix64(base ^ ((row_start >> 32) * 2 + 1 + (draw << 33)) & MASK64)
    return key & MASK32, key >> 32


def noise(
    base: int, first: int, rows: int, row_length: int, slot: int, device: torch.device, column: int = 0
) -> Tensor:
    """The words of one slot as signed integers, float32 (rows, row_length); arguments as for :func:`words`."""
    h = words(base, first, rows, row_length, slot, device, column)
    return torch.where(h > 0x7FFFFFFF, h - (1 << 32), h).float()


def words(
    base: int, first: int, rows: int, row_length: int, slot: int, device: torch.device, column: int = 0
) -> Tensor:
    """The words of one slot, int64 (rows, row_length).

    ``first`` is the global index of the first row's first element; the words are those from ``column`` of the row on.
    """
    starts = first + row_length * torch.arange(rows, device=device)[:, None]
    high = starts >> 32
    k1, k2 = torch.zeros_like(starts), torch.zeros_like(starts)
    for value in range(first >> 32, ((first + row_length * max(rows - 1, 0)) >> 32) + 1):
        keys = row_keys(base, value << 32, slot // 2)
        k1[high == value], k2[high == value] = keys
    low = starts & MASK32
    h = (low + column + torch.arange(row_length, device=device)) & MASK32
    h = (h * GOLDEN32 + k1) & MASK32
    h = ((h ^ (h >> 16)) * M1 + k2) & MASK32
    h ^= h >> 15
    return ((h << 16) & MASK32) | (h >> 16) if slot % 2 else h
