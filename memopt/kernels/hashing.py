"""Random numbers for stochastic rounding: a counter-based hash, so that nothing is stored and shards agree.

The 32-bit word of an element is a function of (seed, step, parameter number, draw, global element index) alone. One
word serves two states: slot ``j`` takes the lower part of the word of draw ``j // 2`` when ``j`` is even, the upper
when it is odd. The noise of a codec is 23 bits of it as a multiple of 2**-23 between -1/2 and 1/2 (the 7 bits that both
parts have weigh less than 2**-9 in one of them); that of a 16-bit float is 16 bits.

A word is one product of the mixed index. Its factor and shift are those, of some hundreds tried, that leave neighbours
the least correlated; a shift after the product adds nothing.

The global index of an element is that of its row's first element plus its place in the row; the index's upper 32 bits
are taken at the start of the row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF
MASK64 = 0xFFFFFFFFFFFFFFFF
GOLDEN32, M1 = 0x9E3779B1, 0x4DAD971D
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


def row_key(base: int, row_start: int, draw: int) -> int:
    """The 32-bit key of a row whose first element has the global index ``row_start``."""
    return mix64(base ^ ((row_start >> 32) * 2 + 1 + (draw << 33)) & MASK64) >> 32


def noise(
    base: int, first: int, rows: int, row_length: int, slot: int, device: torch.device, column: int = 0
) -> Tensor:
    """The noise of one slot for codecs, float32 (rows, row_length) in [-1/2, 1/2); arguments as for :func:`words`."""
    h = words(base, first, rows, row_length, slot // 2, device, column)
    return (h >> 9 if slot % 2 else h & 0x7FFFFF).float() * 2.0**-23 - 0.5


def halves(
    base: int, first: int, rows: int, row_length: int, slot: int, device: torch.device, column: int = 0
) -> Tensor:
    """The 16 bits of one slot, int64 (rows, row_length); arguments as for :func:`words`."""
    h = words(base, first, rows, row_length, slot // 2, device, column)
    return h >> 16 if slot % 2 else h & 0xFFFF


def words(
    base: int, first: int, rows: int, row_length: int, draw: int, device: torch.device, column: int = 0
) -> Tensor:
    """The words of one draw, int64 (rows, row_length).

    ``first`` is the global index of the first row's first element; the words are those from ``column`` of the row on.
    """
    starts = first + row_length * torch.arange(rows, device=device)[:, None]
    high, keys = starts >> 32, torch.zeros_like(starts)
    for value in range(first >> 32, ((first + row_length * max(rows - 1, 0)) >> 32) + 1):
        keys[high == value] = row_key(base, value << 32, draw)
    h = ((starts & MASK32) + column + torch.arange(row_length, device=device)) & MASK32
    h = (h * GOLDEN32 + keys) & MASK32
    return ((h ^ (h >> 14)) * M1) & MASK32
