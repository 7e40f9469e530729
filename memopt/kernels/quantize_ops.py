"""Quantise and dequantise as registered operations, and the choice of the implementation that carries them out.

``memopt::quantize_blockwise`` and ``memopt::dequantize_blockwise`` know a codec by its name and block, so that
torch.compile, fake tensors and ``torch.library.opcheck`` can follow them. :func:`encode` and :func:`decode` are what
they do, into memory that is given.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memopt.kernels import quantize_torch
from memopt.kernels.backend import choose_backend
from memopt.kernels.codecs import Codec, get_codec
from memopt.kernels.hashing import Rounding


def encode(x: Tensor, codes: Tensor, scales: Tensor, codec: Codec, rounding: Rounding) -> None:
    """Writes the codes and scales of ``x``; both are contiguous and have the shapes that ``codec.blocks`` tells."""
    backend, done = choose_backend(x.device), False
    if backend == "native":
        from memopt.kernels.native.quantize import quantize as native

        done = native(x, codes, scales, codec, rounding)
    elif backend == "triton":
        from memopt.kernels.gpu.quantize import quantize as triton

        done = triton(x, codes, scales, codec, rounding)
    if not done:
        plain_codes, plain_scales = quantize_torch.quantize(x, codec, rounding)
        codes.copy_(plain_codes)
        scales.copy_(plain_scales)


def decode(codes: Tensor, scales: Tensor, codec: Codec, out: Tensor) -> None:
    """Writes the values into ``out``, which is contiguous."""
    backend, done = choose_backend(out.device), False
    if backend == "native":
        from memopt.kernels.native.quantize import dequantize as native

        done = native(codes, scales, codec, out)
    elif backend == "triton":
        from memopt.kernels.gpu.quantize import dequantize as triton

        done = triton(codes, scales, codec, out)
    if not done:
        out.copy_(quantize_torch.dequantize(codes, scales, tuple(out.shape), codec))


def empty(x: Tensor, codec: Codec) -> tuple[Tensor, Tensor]:
    """Fresh codes and scales for ``x``."""
    blocks = codec.blocks(x.shape)
    codes = x.new_empty(blocks.code_shape(x.shape, codec.bits), dtype=torch.uint8)
    return codes, x.new_empty(blocks.scale_shape, dtype=torch.float32)


@torch.library.custom_op("memopt::quantize_blockwise", mutates_args=())
def quantize(
    x: Tensor, codec: str, block: int, rounding: str, seed: int, step: int, number: int, offset: int
) -> tuple[Tensor, Tensor]:
    """Codes and scales of ``x``: see :func:`memopt.kernels.quantize_blockwise`."""
    chosen = get_codec(codec).with_block(block)
    codes, scales = empty(x, chosen)
    encode(x, codes, scales, chosen, Rounding(rounding, seed, step, number, offset))
    return codes, scales


@quantize.register_fake
def _(
    x: Tensor, codec: str, block: int, rounding: str, seed: int, step: int, number: int, offset: int
) -> tuple[Tensor, Tensor]:
    return empty(x, get_codec(codec).with_block(block))


@torch.library.custom_op("memopt::dequantize_blockwise", mutates_args=())
def dequantize(
    codes: Tensor, scales: Tensor, shape: Sequence[int], codec: str, block: int, dtype: torch.dtype
) -> Tensor:
    """The tensor of this shape and dtype: see :func:`memopt.kernels.dequantize_blockwise`."""
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    decode(codes, scales, get_codec(codec).with_block(block), out)
    return out


@dequantize.register_fake
def _(codes: Tensor, scales: Tensor, shape: Sequence[int], codec: str, block: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(shape, dtype=dtype)
