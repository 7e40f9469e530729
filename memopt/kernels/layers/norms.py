"""RMSNorm and LayerNorm that keep one or two numbers per row beside a tensor which is there anyway."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memopt.kernels.layers.pieces import check_float, opmath, pieces, refuse_recorded_backward


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
    element. float32 working space of a few MiB.
    """
    return _norm(x, weight, None, eps, keep, centred=False)


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *, keep: str = "input"
) -> Tensor:
    """y = weight * (x - mean(x)) / sqrt(var(x) + eps) + bias along rows; otherwise as :func:`rms_norm`."""
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
    zero = keep == "output" and weight is not None and weight.device.type == "cpu" and not bool(weight.all())
    if zero:
        raise ValueError("weight holds a zero: keep='output' would divide by it; use keep='input'")
    y: Tensor = _Norm.apply(x, weight, bias, eps, keep == "output", centred)[0]  # type: ignore[no-untyped-call]
    return y


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, keep_output: bool, centred: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        kind = opmath(x)
        flat = x.reshape(-1, x.shape[-1])
        y = torch.empty_like(flat)
        mean = torch.empty(flat.shape[0] if centred else 0, 1, dtype=kind, device=x.device)
        inverse = torch.empty(flat.shape[0], 1, dtype=kind, device=x.device)
        for rows in pieces(*flat.shape):
            wide = flat[rows].to(kind)
            if centred:
                mean[rows] = wide.mean(1, keepdim=True)
                wide = wide - mean[rows]
            inverse[rows] = (wide.square().mean(1, keepdim=True) + eps).rsqrt()
            wide = wide * inverse[rows]
            if weight is not None:
                wide *= weight
            if bias is not None:
                wide += bias
            y[rows] = wide
        return y.view(x.shape), mean, inverse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, bias, _, ctx.keep_output, ctx.centred = inputs
        ctx.mark_non_differentiable(*output[1:])
        kept = output[0] if ctx.keep_output else x
        mean = output[1] if ctx.centred and not ctx.keep_output else None
        ctx.save_for_backward(kept, weight, bias, mean, output[2])

    @staticmethod
    def backward(ctx: Any, of_y: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        refuse_recorded_backward("layer_norm" if ctx.centred else "rms_norm")
        kept, weight, bias, mean, inverse = ctx.saved_tensors
        kind = inverse.dtype
        D = kept.shape[-1]
        flat, upstream = kept.reshape(-1, D), of_y.reshape(-1, D)
        of_x = torch.empty_like(flat)
        of_weight = torch.zeros(D, dtype=kind, device=flat.device)
        of_bias = torch.zeros_like(of_weight)
        for rows in pieces(*flat.shape):
            wide, g = flat[rows].to(kind), upstream[rows].to(kind)
            if ctx.keep_output:
                wide = wide if bias is None else wide - bias
                unit = wide if weight is None else wide / weight
            else:
                unit = (wide if mean is None else wide - mean[rows]) * inverse[rows]
            of_weight += (g * unit).sum(0)
            of_bias += g.sum(0)
            if weight is not None:
                g = g * weight
            along = (g * unit).mean(1, keepdim=True)
            if ctx.centred:
                g = g - g.mean(1, keepdim=True)
            of_x[rows] = (g - unit * along) * inverse[rows]
        return (
            of_x.view(kept.shape),
            None if weight is None else of_weight.to(weight.dtype),
            None if bias is None else of_bias.to(bias.dtype),
            None,
            None,
            None,
        )
