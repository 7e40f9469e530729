"""The dynamic map of 8 bits (Dettmers, 1511.04561; 8-bit optimizers, 2110.02861), as bitsandbytes builds it.

The magnitudes are decades: the i-th of 7 has 2**i (signed) or 2**(i+1) (unsigned) values, the middles of equal parts
of [0.1, 1] times 10**(i-6). Zero and 1 are added; -1 is missing. Codes, scales and, for flat tensors, blocks are those
of bitsandbytes. Three differences: rounding to nearest is exact (bitsandbytes on a CPU misses 0.2 to 6 % of codes);
stochastic rounding exists (without -1, values below the lowest code round up to it); and in the unsigned map a value
above zero never gets the code of zero, because a second moment of 0 makes Adam's update explode.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch

from memopt.kernels import math as km
from memopt.kernels.codecs.base import BIAS, Codec, register_codec
from memopt.kernels.codecs.rounding import turning_points


@functools.cache
def dynamic_levels(bits: int, *, signed: bool) -> tuple[float, ...]:
    """All values of the map, ascending, as the float32 numbers that bitsandbytes has."""
    magnitudes = [v for part in _decades(bits, signed) for v in part]
    negatives = [-v for v in magnitudes] if signed else []
    return tuple(sorted([*negatives, 0.0, *magnitudes, 1.0]))


def _decades(bits: int, signed: bool) -> list[list[float]]:
    count = bits - 1
    decades = []
    for i in range(count):
        parts = 2**i if signed else 2 ** (i + 1)
        edges = torch.linspace(0.1, 1, parts + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2.0
        decades.append((10.0 ** (i + 1 - count) * middles).tolist())
    return decades


@dataclass(frozen=True)
class Dynamic(Codec):
    """Codes into the 256 ascending values; of the signed map, code 127 is zero."""

    name: str = "dynamic8"
    bits: int = 8
    signed: bool = True

    def encode(self, x: Any, inverse: Any, noise: Any | None) -> Any:
        a = x * inverse
        m = km.abs(a) if self.signed else a
        levels = self.magnitudes
        t = self._number(m)
        if noise is None:
            # The nearest level or the one before it; comparing with the middles makes it exact.
            j = km.clamp(km.floor(t + 0.25), 0.0, len(levels) - 2.0)
            j = km.where(m > km.take(turning_points(levels), j), j + 1.0, j)
        else:
            j = km.clamp(km.floor(t), 0.0, len(levels) - 2.0)
            j = km.where(t - j > noise + 0.5, j + 1.0, j)
        if not self.signed:
            return km.where(m > 0.0, km.maximum(j, 1.0), j) + BIAS
        return km.where(a < 0.0, 127.0 - km.minimum(j, 127.0), 127.0 + j) + BIAS

    def decode(self, code: Any, scale: Any) -> Any:
        return km.take(dynamic_levels(8, signed=self.signed), code) * scale

    @property
    def magnitudes(self) -> tuple[float, ...]:
        """The levels from zero up."""
        return tuple(v for v in dynamic_levels(8, signed=self.signed) if v >= 0)

    def _number(self, m: Any) -> Any:
        """The number of m among the levels from zero up: whole at a level (to 2**-16), linear between neighbours."""
        pieces = self._pieces
        e = km.clamp(km.exponent(m), float(pieces.lowest), 0.0) - float(pieces.lowest)
        piece = km.take(pieces.first, e)
        for turns in (pieces.turns, pieces.second_turns):
            piece = km.where(m > km.take(turns, e), piece + 1.0, piece)
        return km.fma(m, km.take(pieces.slopes, piece), km.take(pieces.offsets, piece))

    @property
    def _pieces(self) -> _Pieces:
        return _pieces(self.signed)


@dataclass(frozen=True)
class _Pieces:
    """The numbers of the levels as a function of magnitude: straight within a decade and from one to the next.

    A piece ends at the first or last level of a decade. ``first[e]`` is the first piece of the binade
    ``2**(e + lowest)``, ``turns`` and ``second_turns`` say where the next two begin, 4 where that is beyond it.
    """

    lowest: int
    first: tuple[float, ...]
    turns: tuple[float, ...]
    second_turns: tuple[float, ...]
    slopes: tuple[float, ...]
    offsets: tuple[float, ...]


@functools.cache
def _pieces(signed: bool) -> _Pieces:
    corners, numbers, number = [0.0], [0], 1
    for part in _decades(8, signed):
        ends = {number: part[0], number + len(part) - 1: part[-1]}
        numbers, corners = [*numbers, *ends], [*corners, *ends.values()]
        number += len(part)
    numbers, corners = [*numbers, number], [*corners, 1.0]
    slopes = [(n - m) / (b - a) for a, b, m, n in zip(corners, corners[1:], numbers, numbers[1:], strict=False)]
    offsets = [m - a * slope for a, m, slope in zip(corners, numbers, slopes, strict=False)]
    lowest = math.frexp(corners[1])[1] - 2  # a binade below the first level
    first, turns = [], []
    for e in range(lowest, 1):
        first.append(float(sum(0 < c <= 2.0**e for c in corners[:-1])))
        turns.append([*(c for c in corners[:-1] if 2.0**e < c < 2.0 ** (e + 1)), 4.0, 4.0])
    return _Pieces(
        lowest, tuple(first), tuple(t[0] for t in turns), tuple(t[1] for t in turns), tuple(slopes), tuple(offsets)
    )


register_codec(Dynamic())
register_codec(Dynamic(name="dynamic8u", signed=False))
