"""A quantised tensor: the value that carries codes and scales, and the checks of what may become one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memopt.kernels.codecs import Codec, get_codec

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Quantized:
    """A tensor as codes and scales.

    Attributes:
        codes: uint8; the tensor's shape for 8-bit codecs; (rows, bytes) or, of a 1-D tensor, (bytes,) for 4-bit ones.
        scales: float32 (rows, blocks), or (blocks,) of a 1-D tensor.
        shape: the shape of the tensor.
        codec: how to read the codes.

    Rows are the slices of the first dimension: ``codes`` and ``scales`` may be cut along theirs as the tensor is.
    """

    codes: Tensor
    scales: Tensor
    shape: tuple[int, ...]
    codec: Codec

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.numel() * self.codes.element_size() + self.scales.numel() * self.scales.element_size()

    @classmethod
    def zeros(cls, shape: tuple[int, ...], codec: Codec | str, device: torch.device | str = "cpu") -> Quantized:
        """A quantised tensor of zeros: every scale is 0."""
        codec = get_codec(codec)
        shape = tuple(shape)
        blocks = codec.blocks(shape)
        codes = torch.zeros(blocks.code_shape(shape, codec.bits), dtype=torch.uint8, device=device)
        return cls(codes, torch.zeros(blocks.scale_shape, dtype=torch.float32, device=device), shape, codec)


def check_floating(name: str, x: Tensor) -> None:
    """Refuses what is not a dense float tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise ValueError(f"{name} must be float32, bfloat16 or float16, got {x.dtype}; convert it first")
    if x.layout is not torch.strided:
        raise ValueError(f"{name} must be dense, got layout {x.layout}; call .to_dense() first")


def check_rounding(rounding: str) -> None:
    """Refuses an unknown rounding."""
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"rounding must be 'nearest' or 'stochastic', got {rounding!r}")
