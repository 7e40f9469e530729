"""ReLU that keeps one bit per element."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memopt.kernels.layers.pieces import check_float, pieces, refuse_recorded_backward


def packed_relu(x: Tensor) -> Tensor:
    """max(x, 0), NaN stays NaN; backward knows the sign of each element from one bit.

    Bits: element 8 i + b of the flattened input is bit b of byte i, set where x > 0.

    Args:
        x: any shape, floating.

    Returns:
        The same shape and dtype.

    Raises:
        ValueError, TypeError: ``x`` is not a floating tensor.

    Cost: one bit per element. torch keeps the output; where the next layer keeps it too, torch's costs nothing and this
    one a bit: use it where the next layer does not (a norm, a quantised or recomputed input).
    """
    check_float("x", x)
    y: Tensor = _PackedReLU.apply(x)[0]  # type: ignore[no-untyped-call]
    return y


def pack_bits(flags: Tensor) -> Tensor:
    """(n,) booleans to (ceil(n / 8),) bytes, the first in the lowest bit."""
    count = flags.shape[0]
    out = torch.empty(-(-count // 8), dtype=torch.uint8, device=flags.device)
    powers = 2 ** torch.arange(8, dtype=torch.uint8, device=flags.device)
    for part in pieces(out.shape[0], 8):
        bits = flags[8 * part.start : 8 * part.stop].to(torch.uint8)
        bits = torch.nn.functional.pad(bits, (0, -bits.shape[0] % 8))
        out[part] = (bits.view(-1, 8) * powers).sum(1, dtype=torch.uint8)
    return out


def unpack_bits(packed: Tensor, first: int, stop: int) -> Tensor:
    """Booleans ``first`` to ``stop``; ``first`` is a multiple of eight."""
    powers = 2 ** torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = packed[first // 8 : -(-stop // 8)].unsqueeze(1) & powers
    return bits.ne(0).view(-1)[: stop - first]


class _PackedReLU(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.clamp_min(0), pack_bits((x > 0).reshape(-1))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, of_y: Tensor, _: Tensor) -> Tensor:
        refuse_recorded_backward("packed_relu")
        (packed,) = ctx.saved_tensors
        of_x = torch.empty_like(of_y, memory_format=torch.contiguous_format)
        flat, upstream = of_x.view(-1), of_y.reshape(-1)
        for part in pieces(flat.shape[0], 1):  # a piece starts at a multiple of eight: PIECE_BYTES / 4 elements
            flat[part] = torch.where(unpack_bits(packed, part.start, part.stop), upstream[part], 0)
        return of_x
