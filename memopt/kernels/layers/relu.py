"""ReLU that keeps one bit per element."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memopt.kernels.layers.choosing import implementation
from memopt.kernels.layers.masks import Masked
from memopt.kernels.layers.pieces import check_float


def packed_relu(x: Tensor) -> Tensor:
    """max(x, 0), NaN stays NaN; backward knows the sign of each element from one bit.

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


@torch.library.custom_op("memopt::packed_relu", mutates_args=())
def relu(x: Tensor) -> tuple[Tensor, Tensor]:
    """max(x, 0), and the bits of x > 0 as :func:`memopt.kernels.layers.pack_mask` packs them."""
    y, packed = implementation(x, "masks").relu(x.contiguous())
    return y, packed


@relu.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    packed = x.new_empty((-(-x.numel() // 8),), dtype=torch.uint8)
    return torch.empty_like(x, memory_format=torch.contiguous_format), packed


class _PackedReLU(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        y, packed = relu(x)
        return y, packed

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, of_y: Tensor, _: Tensor) -> Tensor:
        of_x: Tensor = Masked.apply(of_y, *ctx.saved_tensors, 1.0)  # type: ignore[no-untyped-call]
        return of_x
