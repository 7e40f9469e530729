"""The dynamic map of 8 bits (Dettmers, 1511.04561; 8-bit optimizers, 2110.02861), as bitsandbytes builds it.

The magnitudes are decades: the i-th of 7 has 2**i (signed) or 2**(i+1) (unsigned) values, the middles of equal parts
of [0.1, 1] times 10**(i-6). Zero and 1 are added; -1 is missing. Codes, scales and, for flat tensors, blocks are those
of bitsandbytes. Three differences: rounding to nearest is exact (bitsandbytes on a CPU misses 0.2 to 6 % of codes);
stochastic rounding exists (without -1, values below the lowest code round up to it); and in the unsigned map a value
above zero never gets the code of zero, because a second moment of 0 makes Adam's update explode.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from memopt.kernels import math as km
from memopt.kernels.codecs.base import BIAS, NOISE, Codec, register_codec
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
        starts, slopes, offsets = self._pieces
        slope, offset = slopes[0], offsets[0]
        for start, s, o in zip(starts[1:], slopes[1:], offsets[1:], strict=True):
            slope, offset = km.where(m > start, s, slope), km.where(m > start, o, offset)
        # The number of a level at or just below m, or one less; comparing with the tables makes it exact.
        j = km.floor(km.fma(m, slope, offset))
        j = km.clamp(j, 0.0, len(levels) - 2.0)
        if noise is None:
            j = km.where(m > km.take(turning_points(levels), j), j + 1.0, j)
        else:
            j = km.where(m >= km.take(levels[1:], j), km.minimum(j + 1.0, len(levels) - 2.0), j)
            low = km.take(levels, j)
            j = km.where(m > low + (noise * NOISE + 0.5) * (km.take(levels[1:], j) - low), j + 1.0, j)
        if not self.signed:
            return km.where(m > 0.0, km.maximum(j, 1.0), j) + BIAS
        return km.where(a < 0.0, 127.0 - km.minimum(j, 127.0), 127.0 + j) + BIAS

    def decode(self, code: Any, scale: Any) -> Any:
        return km.take(dynamic_levels(8, signed=self.signed), code) * scale

    @property
    def magnitudes(self) -> tuple[float, ...]:
        """The levels from zero up."""
        return tuple(v for v in dynamic_levels(8, signed=self.signed) if v >= 0)

    @property
    def _pieces(self) -> tuple[list[float], list[float], list[float]]:
        """For each decade: where it starts, and the line through its levels' numbers, a quarter lower.

        The floor of ``slope * m + offset`` is the number of the level nearest to m, or of the level at or below m, or
        one less, with a quarter of a level to spare for rounding errors.
        """
        starts, slopes, offsets = [0.0], [], []
        number = 1
        for i, part in enumerate(_decades(8, self.signed)):
            width = 0.9 * 10.0 ** (i - 6) / len(part)
            slopes.append(1 / width)
            offsets.append(number - part[0] / width - 0.25)
            if i:
                starts.append(10.0 ** (i - 6) * 0.1)
            number += len(part)
        return starts, slopes, offsets


register_codec(Dynamic())
register_codec(Dynamic(name="dynamic8u", signed=False))
