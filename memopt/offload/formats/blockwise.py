"""Codes of 8 or 4 bits with one scale per block, rounded to nearest.

The error of an element is at most half the distance between the two levels around it, times its block's scale, the
largest magnitude among ``block`` neighbours in memory. 8 bits take 1.016 bytes per element, 4 bits 0.563.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memopt.offload.formats.format import Decoder, Format, closed_over

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Blockwise(Format):
    """A codec of the kernels room.

    Args:
        codec: its name.
        block: elements per scale.
    """

    def __init__(self, codec: str, block: int) -> None:
        self.codec, self.block = codec, block

    def encode(self, flat: Tensor, width: int, signs: bool) -> Decoder | None:
        """Codes and scales; only for float32, bfloat16 and float16."""
        if flat.dtype not in _FLOATS:
            return None
        from memopt.kernels import get_codec, quantize_blockwise

        quantized = quantize_blockwise(flat, get_codec(self.codec).with_block(self.block), rounding="nearest")
        return closed_over(_decode, quantized, flat.dtype)


def _decode(quantized: object, dtype: torch.dtype) -> Tensor:
    from memopt.kernels import Quantized, dequantize_blockwise

    assert isinstance(quantized, Quantized)
    return dequantize_blockwise(quantized, dtype=dtype)
