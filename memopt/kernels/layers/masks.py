"""One bit per element: packing, unpacking, and what is done with a packed mask.

Bits: element 8 i + b of the flattened tensor is bit b of byte i; the last byte is filled up with zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memopt.kernels.layers.choosing import implementation


def pack_mask(flags: Tensor) -> Tensor:
    """A boolean tensor as bits: uint8 (ceil(n / 8),).

    Raises:
        ValueError, TypeError: ``flags`` is not a boolean tensor.
    """
    if not isinstance(flags, Tensor):
        raise TypeError(f"flags must be a tensor, got {type(flags).__name__}")
    if flags.dtype != torch.bool:
        raise ValueError(f"flags must be boolean, got {flags.dtype}; compare it first")
    packed: Tensor = pack(flags)
    return packed


def unpack_mask(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The booleans that :func:`pack_mask` packed.

    Args:
        packed: its result, uint8, one-dimensional.
        shape: of the booleans.

    Raises:
        ValueError: ``packed`` does not hold that many bits.
    """
    count = 1
    for size in shape:
        count *= size
    if packed.dtype != torch.uint8 or packed.shape != (-(-count // 8),):
        raise ValueError(
            f"packed must be uint8 of shape ({-(-count // 8)},) for {tuple(shape)}, got {packed.dtype} "
            f"{tuple(packed.shape)}"
        )
    flags: Tensor = unpack(packed, shape)
    return flags


@torch.library.custom_op("memopt::pack_mask", mutates_args=())
def pack(flags: Tensor) -> Tensor:
    """See :func:`pack_mask`."""
    packed: Tensor = implementation(flags, "masks").pack(flags.contiguous().view(-1))
    return packed


@torch.library.custom_op("memopt::unpack_mask", mutates_args=())
def unpack(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """See :func:`unpack_mask`."""
    flags = torch.empty(shape, dtype=torch.bool, device=packed.device)
    implementation(packed, "masks").unpack(packed.contiguous(), flags.view(-1))
    return flags


@torch.library.custom_op("memopt::masked", mutates_args=())
def masked(x: Tensor, packed: Tensor, scale: float) -> Tensor:
    """x * scale where the bit is set, else zero."""
    y: Tensor = implementation(x, "masks").masked(x.contiguous(), packed, scale)
    return y


@pack.register_fake
def _(flags: Tensor) -> Tensor:
    return flags.new_empty((-(-flags.numel() // 8),), dtype=torch.uint8)


@unpack.register_fake
def _(packed: Tensor, shape: Sequence[int]) -> Tensor:
    return packed.new_empty(shape, dtype=torch.bool)


@masked.register_fake
def _(x: Tensor, packed: Tensor, scale: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


class Masked(torch.autograd.Function):
    """``masked``, differentiable any number of times: its derivative is itself."""

    @staticmethod
    def forward(x: Tensor, packed: Tensor, scale: float) -> Tensor:
        y: Tensor = masked(x, packed, scale)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, packed, ctx.scale = inputs
        ctx.save_for_backward(packed)

    @staticmethod
    def backward(ctx: Any, of_y: Tensor) -> tuple[Tensor, None, None]:
        return Masked.apply(of_y, *ctx.saved_tensors, ctx.scale), None, None  # type: ignore[no-untyped-call]
