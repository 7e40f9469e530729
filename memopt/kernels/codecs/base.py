"""What a codec is, and the registry through which new ones are found."""

from __future__ import annotations

import abc
from dataclasses import dataclass, replace
from typing import Any

import torch

from memopt.kernels.blocks import Blocks, blocks_of

# Adding it to a float32 below 2**22 rounds that to a whole number, which is then in its low bits; not 2**23, because
# the sum must stay clear of the change of spacing there.
BIAS = 1.5 * 2.0**23


@dataclass(frozen=True)
class Codec(abc.ABC):
    """Blocks of float32 values as codes of ``bits`` bits and one float32 scale, the block's largest magnitude.

    ``encode`` and ``decode`` are written with :mod:`memopt.kernels.math`, so that they run on tensors (the oracle) and
    print as C++ and Triton. Between them and the values stand the scale and the constant ``unit``::

        code = encode(x, unit / scale, noise)       value = decode(code, scale)

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
    def encode(self, x: Any, inverse: Any, noise: Any | None) -> Any:
        """A positive float32 that has the code, in ``[0, 2**bits)``, in its low bits, such as ``BIAS`` plus the code.

        ``|x| * inverse`` is at most ``unit`` but for rounding errors; with noise, at most ``unit * (1 - 2**-20)``, so
        that none of them leads beyond the last code. ``noise`` is None for the nearest value (exactly, ties towards
        zero), else a uniform in ``[-1/2, 1/2)`` for stochastic rounding: between neighbours of width w the turn lies at
        ``middle + noise * w``, so that the mean of the decoded value is the value.
        """

    @abc.abstractmethod
    def decode(self, code: Any, scale: Any) -> Any:
        """The value of a whole-valued code; what depends on ``scale`` alone is computed once per block."""

    def top(self, rounding: str) -> float:
        """``scale`` times ``inverse``: ``unit``, or a little less where rounding is stochastic."""
        return self.unit if rounding == "nearest" else self.unit * (1 - 2.0**-20)

    def with_block(self, block: int) -> Codec:
        """The same codec with another block size, a positive number of elements."""
        if isinstance(block, bool) or not isinstance(block, int) or block < 1:
            raise ValueError(f"block must be a positive whole number, got {block!r}")
        return self if block == self.block else replace(self, block=block)

    def blocks(self, shape: torch.Size | tuple[int, ...]) -> Blocks:
        """How a tensor of this shape is cut up."""
        return blocks_of(shape, self.block)

    def values(self) -> torch.Tensor:
        """The decoded value of every code at scale 1, float32 (2**bits,); codes never produced extend the map."""
        value: torch.Tensor = self.decode(torch.arange(2**self.bits, dtype=torch.float32), torch.ones(()))
        return value


_CODECS: dict[str, Codec] = {}


def register_codec(codec: Codec) -> Codec:
    """Makes a codec known under its name.

    Args:
        codec: found by :func:`get_codec` from now on.

    Returns:
        The same codec.

    Raises:
        ValueError: the name is taken.
    """
    if codec.name in _CODECS:
        raise ValueError(f"a codec named {codec.name!r} is registered already")
    _CODECS[codec.name] = codec
    return codec


def get_codec(name: str | Codec) -> Codec:
    """The codec of that name with its usual block size.

    Args:
        name: one of :func:`codec_names`; a codec passes through.

    Raises:
        ValueError: no such codec; the message lists them.
    """
    if isinstance(name, Codec):
        return name
    if not isinstance(name, str) or name not in _CODECS:
        raise ValueError(f"codec must be a Codec or one of {', '.join(sorted(_CODECS))}, got {name!r}")
    return _CODECS[name]


def is_registered(codec: Codec) -> bool:
    """Whether the codec follows from its registered name and its block size: only then may an operator name it."""
    known = _CODECS.get(codec.name)
    return known is not None and replace(known, block=codec.block, rounding=codec.rounding) == codec


def codec_names() -> tuple[str, ...]:
    """Names of all registered codecs, sorted."""
    return tuple(sorted(_CODECS))
