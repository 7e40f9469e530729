"""RMSNorm and LayerNorm that keep one or two numbers per row beside a tensor which is there anyway."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memopt.kernels.layers.choosing import implementation
from memopt.kernels.layers.norms_torch import Kept
from memopt.kernels.layers.pieces import check_float, opmath, refuse_recorded_backward


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, keep: str = "input") -> Tensor:
    """y = weight * x / sqrt(mean(x^2) + eps) along the last dimension, in float32, rounded once to the dtype of ``x``.

    Args:
        x: (..., D). weight: (D,), None for ones.
        eps: added under the root, not negative.
        keep: "input" keeps ``x`` for backward. "output" keeps ``y`` in its place, which the next linear layer keeps as
            well, so that ``x`` can go: backward divides by ``weight`` again. Its gradients carry the rounding of ``y``,
            and no weight may be zero.

    Returns:
        (..., D) in the dtype of ``x``.

    Raises:
        ValueError, TypeError: inputs that do not fit; a weight of zero with ``keep="output"``.

    Cost: 4 bytes per row beside the kept tensor, where a norm written in plain operations keeps 10 to 14 bytes per
    element. float32 working space of a few MiB in the torch implementation, of ``32 * D`` doubles in the native one.
    """
    return _norm(x, weight, None, eps, keep, centred=False)


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *, keep: str = "input"
) -> Tensor:
    """y = weight * (x - mean(x)) / sqrt(var(x) + eps) + bias along the last dimension, in float32, rounded once.

    Args:
        x: (..., D).
        weight: (D,) or None for ones.
        bias: (D,) or None for zeros.
        eps: added to the variance.
        keep: what backward works from, "input" or "output", as for :func:`rms_norm`; cost and errors are its too.

    Returns:
        y, of the shape and dtype of ``x``.
    """
    return _norm(x, weight, bias, eps, keep, centred=True)


def _norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, keep: str, centred: bool) -> Tensor:
    check_float("x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have a last dimension to normalise along, got shape {tuple(x.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            check_float(name, tensor)
            if tuple(tensor.shape) != (x.shape[-1],):
                raise ValueError(f"{name} must have shape ({x.shape[-1]},), got {tuple(tensor.shape)}")
    if not 0.0 <= eps < float("inf"):
        raise ValueError(f"eps must be a finite number, not negative, got {eps}")
    if keep not in ("input", "output"):
        raise ValueError(f"keep must be 'input' or 'output', got {keep!r}")
    # Only where looking at the weight is free: not on a GPU, not while a graph is captured.
    looks = keep == "output" and weight is not None and weight.device.type == "cpu"
    if looks and not torch.compiler.is_compiling() and not bool(weight.all()):  # type: ignore[union-attr]
        raise ValueError("weight holds a zero: keep='output' would divide by it; use keep='input'")
    y: Tensor = _Norm.apply(x, weight, bias, eps, keep == "output", centred)[0]  # type: ignore[no-untyped-call]
    return y


@torch.library.custom_op("memopt::norm", mutates_args=())
def norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y in the shape of ``x``; mean and 1 / deviation of each row, (rows,), the mean (0,) unless ``centred``."""
    y, mean, inverse = implementation(x, "norms").norm(x.contiguous(), weight, bias, eps, centred)
    return y, mean, inverse


@torch.library.custom_op("memopt::norm_backward", mutates_args=())
def norm_backward(
    of_y: Tensor,
    kept: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    inverse: Tensor,
    keep_output: bool,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x (its shape), weight and bias ((D,), in the dtype of the statistics; only where there are)."""
    all_kept = Kept(kept.contiguous(), weight, bias, mean, inverse, keep_output, centred)
    of_x, of_weight, of_bias = implementation(kept, "norms").norm_backward(of_y.contiguous(), all_kept)
    return of_x, of_weight, of_bias


@norm.register_fake
def _(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.numel() // x.shape[-1]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    kind = opmath(x)
    return y, x.new_empty((rows if centred else 0,), dtype=kind), x.new_empty((rows,), dtype=kind)


@norm_backward.register_fake
def _(
    of_y: Tensor,
    kept: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    inverse: Tensor,
    keep_output: bool,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    of_x = torch.empty_like(kept, memory_format=torch.contiguous_format)
    return of_x, inverse.new_empty((kept.shape[-1],)), inverse.new_empty((kept.shape[-1],))


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, keep_output: bool, centred: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, inverse = norm(x, weight, bias, eps, centred)
        return y, mean, inverse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, bias, _, ctx.keep_output, ctx.centred = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(output[0] if ctx.keep_output else x, weight, bias, *output[1:])

    @staticmethod
    def backward(ctx: Any, of_y: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        refuse_recorded_backward("layer_norm" if ctx.centred else "rms_norm")
        _, weight, bias, *_ = ctx.saved_tensors
        with torch.no_grad():  # torch.func.grad records, and registered operations cannot
            of_x, of_weight, of_bias = norm_backward(of_y, *ctx.saved_tensors, ctx.keep_output, ctx.centred)
        to_weight = None if weight is None else of_weight.to(weight.dtype)
        to_bias = None if bias is None else of_bias.to(bias.dtype)
        return of_x, to_weight, to_bias, None, None, None
