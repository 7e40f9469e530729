"""What a codec is, and the registry through which new ones are found."""

from __future__ import annotations

import abc
from dataclasses import dataclass, replace
from typing import Any

import torch

from memopt.kernels.blocks import Blocks, blocks_of


@dataclass(frozen=True)
class Codec(abc.ABC):
    """Blocks of float32 values as codes of ``bits`` bits and one float32 scale, the block's largest magnitude.

    ``encode`` and ``decode`` are written with :mod:`memopt.kernels.math`, so that they run on tensors (the oracle) and
    print as C++ and Triton. Between them and the values stand the scale and the constant ``unit``::

        code = encode(x * (unit / scale), u)        value = decode(code) * scale

    A block of zeros has scale 0 and decodes to zeros. A block that holds a NaN or an infinity has scale NaN, and all of
    it decodes to NaN.

    Args:
        block: elements per scale.
        rounding: what an optimizer state uses unless told otherwise, ``"nearest"`` or ``"stochastic"``.
    """

    block: int = 256
    rounding: str = "nearest"

    name = ""
    bits = 8
    signed = True
    unit = 1.0

    @abc.abstractmethod
    def encode(self, a: Any, u: Any | None) -> Any:
        """The whole-valued code in ``[0, 2**bits)`` of ``a`` in ``[-unit, unit]``.

        ``u`` is None for the nearest value (exactly, ties towards zero), else a uniform in (0, 1) for stochastic
        rounding between the two neighbours, so that the mean over ``u`` of the decoded value is the value.
        """

    @abc.abstractmethod
    def decode(self, code: Any) -> Any:
        """The value in [-1, 1] of a whole-valued code."""

    def with_block(self, block: int) -> Codec:
        """The same codec with another block size."""
        return replace(self, block=block)

    def blocks(self, shape: torch.Size | tuple[int, ...]) -> Blocks:
        """How a tensor of this shape is cut up."""
        return blocks_of(shape, self.block)

    def values(self) -> torch.Tensor:
        """The decoded value of every code, float32 (2**bits,); codes never produced repeat or extend the map."""
        value = self.decode(torch.arange(2**self.bits, dtype=torch.float32))
        return torch.as_tensor(value, dtype=torch.float32)


_CODECS: dict[str, Codec] = {}


def register_codec(codec: Codec) -> Codec:
    """Makes a codec known under its name; returns it."""
    if codec.name in _CODECS:
        raise ValueError(f"a codec named {codec.name!r} is registered already")
    _CODECS[codec.name] = codec
    return codec


def get_codec(name: str | Codec) -> Codec:
    """The codec of that name with its usual block size; codecs pass through."""
    if isinstance(name, Codec):
        return name
    if not isinstance(name, str) or name not in _CODECS:
        raise ValueError(f"codec must be a Codec or one of {', '.join(sorted(_CODECS))}, got {name!r}")
    return _CODECS[name]


def codec_names() -> tuple[str, ...]:
    """Names of all registered codecs, sorted."""
    return tuple(sorted(_CODECS))
