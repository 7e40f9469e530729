"""Blockwise quantisation: the functions users call."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from memopt.kernels import quantize_ops
from memopt.kernels.codecs import Codec, get_codec, is_registered
from memopt.kernels.hashing import Rounding
from memopt.kernels.quantized import FLOATS, Quantized, check_floating, check_rounding


def quantize_blockwise(
    x: Tensor,
    codec: Codec | str = "sq127",
    *,
    rounding: str = "nearest",
    seed: int = 0,
    step: int = 0,
    number: int = 0,
    offset: int = 0,
    out: Quantized | None = None,
) -> Quantized:
    """Codes and scales of ``x``.

    Args:
        x: float32, bfloat16 or float16, any shape and strides.
        codec: a :class:`Codec` or its registered name.
        rounding: ``"nearest"`` (exactly) or ``"stochastic"`` (unbiased to ``2**-16`` of a cell).
        seed: what the random numbers depend on, with ``step``, ``number`` and the element's index.
        step: of training.
        number: of the tensor.
        offset: the global index of ``x``'s first element, when ``x`` is some of the rows of a larger tensor.
        out: of the shape, codec and device, to write into; fresh memory costs more than the arithmetic.

    Returns:
        ``out``, or a new :class:`Quantized`. A block that holds a NaN or an infinity has scale NaN and decodes to NaN.
    """
    codec = get_codec(codec)
    check_floating("x", x)
    check_rounding(rounding)
    for name, value in (("seed", seed), ("step", step), ("number", number), ("offset", offset)):
        if not isinstance(value, Integral):
            raise TypeError(f"{name} must be a whole number, got {value!r} of type {type(value).__name__}")
    x = x.detach()
    if out is not None and (tuple(out.shape) != tuple(x.shape) or out.codec != codec or out.codes.device != x.device):
        raise ValueError(
            f"out must hold {tuple(x.shape)} as {codec} on {x.device}, got {tuple(out.shape)} as {out.codec} on "
            f"{out.codes.device}; make it with Quantized.zeros"
        )
    if is_registered(codec) and (out is None or torch.compiler.is_compiling()):
        key = [_signed(part) for part in (seed, step, number, offset)]
        codes, scales = quantize_ops.quantize(x, codec.name, codec.block, rounding, *key)
        if out is None:
            return Quantized(codes, scales, tuple(x.shape), codec)
        out.codes.copy_(codes)
        out.scales.copy_(scales)
        return out
    if out is None:
        out = Quantized(*quantize_ops.empty(x, codec), tuple(x.shape), codec)
    quantize_ops.encode(x, out.codes, out.scales, codec, Rounding(rounding, seed, step, number, offset))
    return out


def dequantize_blockwise(q: Quantized, *, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
    """The tensor of shape ``q.shape`` that the codes stand for.

    Args:
        q: from :func:`quantize_blockwise`.
        dtype: float32, bfloat16 or float16; of the result when there is no ``out``.
        out: a contiguous tensor of that shape to write into; fresh memory costs more than the arithmetic.
    """
    if not isinstance(q, Quantized):
        raise TypeError(f"q must be Quantized, as quantize_blockwise returns it, got {type(q).__name__}")
    if out is None and dtype not in FLOATS:
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    if out is not None:
        check_floating("out", out)
        if tuple(out.shape) != tuple(q.shape) or out.device != q.codes.device or not out.is_contiguous():
            raise ValueError(
                f"out must be contiguous {q.shape} on {q.codes.device}, got {tuple(out.shape)} on {out.device}"
            )
        dtype = out.dtype
    if is_registered(q.codec) and (out is None or torch.compiler.is_compiling()):
        made: Tensor = quantize_ops.dequantize(q.codes, q.scales, q.shape, q.codec.name, q.codec.block, dtype)
        return made if out is None else out.copy_(made)
    if out is None:
        out = torch.empty(q.shape, dtype=dtype, device=q.codes.device)
    quantize_ops.decode(q.codes, q.scales, q.codec, out)
    return out


def _signed(x: int) -> int:
    """What operators take: 64 bits with a sign."""
    return (x + 2**63) % 2**64 - 2**63
