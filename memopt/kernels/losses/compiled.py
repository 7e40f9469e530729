"""The vocabulary loss as two opaque operators, for torch.compile: what happens inside cannot be traced usefully.

Outside torch.compile the loss runs as ordinary operations, so that tools which look at them see its memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memopt.kernels.losses.forward_backward import backward, forward
from memopt.kernels.losses.problem import prepare
from memopt.kernels.losses.row_pass import Gradients, Wanted
from memopt.kernels.losses.settings import Settings


@torch.library.custom_op("memopt::linear_cross_entropy", mutates_args=())
def linear_cross_entropy_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    wanted: list[bool],
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    softcap: float,
    z_loss: float,
    shift: int,
    length: int,
    want_stats: bool,
    chunk_bytes: int,
    mode: str,
    accumulate: str,
    gradient_filter: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, log-sum-exp, entropy and accuracy; then the gradients of the first four arguments for one upstream.

    Gradients that are not ``wanted``, or not made in forward, are empty. With statistics all are left to backward.
    """
    settings = Settings(
        ignore_index,
        reduction,
        label_smoothing,
        softcap,
        z_loss,
        shift,
        length,
        want_stats,
        chunk_bytes,
        mode,
        accumulate,
        gradient_filter,
    )
    problem = prepare(hidden, weight, bias, scale, target, class_weight, settings)
    outcome = forward(problem, Wanted() if settings.want_stats else Wanted(*wanted))
    made = outcome.gradients or Gradients()
    if made.factor is not None:
        made.scale_(torch.ones_like(made.factor))
    return (*outcome[:4], *_filled(made, hidden))


@linear_cross_entropy_forward.register_fake
def _(hidden, weight, bias, scale, target, class_weight, wanted, *choices):  # type: ignore[no-untyped-def]
    settings = Settings(*choices)
    length, shift, mode = settings.length, settings.shift, settings.mode
    opmath = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    count = (hidden.shape[0] // length) * (length - shift) if length else 0
    loss = hidden.new_empty((count,) if settings.reduction == "none" else (), dtype=opmath)
    by_row = (hidden.new_empty((2, count), dtype=opmath), hidden.new_empty((count,), dtype=opmath))
    early = settings.early and not settings.want_stats
    shapes = (hidden.shape, weight.shape, (weight.shape[0],), ())
    dtypes = (hidden.dtype, weight.dtype, opmath, opmath)
    made = [early and w and not (i == 1 and mode == "recompute") for i, w in enumerate(wanted)]
    gradients = (
        hidden.new_empty(shape if there else (0,), dtype=dtype)
        for shape, dtype, there in zip(shapes, dtypes, made, strict=True)
    )
    return (loss, *by_row, hidden.new_empty((), dtype=opmath), *gradients)


@torch.library.custom_op("memopt::linear_cross_entropy_backward", mutates_args=())
def linear_cross_entropy_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    lse: Tensor,
    of_loss: Tensor,
    of_lse: Tensor | None,
    wanted: list[bool],
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    softcap: float,
    z_loss: float,
    shift: int,
    length: int,
    want_stats: bool,
    chunk_bytes: int,
    mode: str,
    accumulate: str,
    gradient_filter: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The ``wanted`` gradients of the first four arguments from logits made again; the others are empty."""
    settings = Settings(
        ignore_index,
        reduction,
        label_smoothing,
        softcap,
        z_loss,
        shift,
        length,
        want_stats,
        chunk_bytes,
        mode,
        accumulate,
        gradient_filter,
    )
    problem = prepare(hidden, weight, bias, scale, target, class_weight, settings)
    return _filled(backward(problem, Wanted(*wanted), lse, of_loss, of_lse), hidden)


@linear_cross_entropy_backward.register_fake
def _(hidden, weight, bias, scale, target, class_weight, lse, of_loss, of_lse, wanted, *rest):  # type: ignore[no-untyped-def]
    opmath = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    shapes = (hidden.shape, weight.shape, (weight.shape[0],), ())
    dtypes = (hidden.dtype, weight.dtype, opmath, opmath)
    return tuple(
        hidden.new_empty(shape if there else (0,), dtype=dtype)
        for shape, dtype, there in zip(shapes, dtypes, wanted, strict=True)
    )


def _filled(gradients: Gradients, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    opmath = torch.float64 if like.dtype == torch.float64 else torch.float32
    hidden, weight, bias, scale = gradients.hidden, gradients.weight, gradients.bias, gradients.scale
    return (
        like.new_empty(0) if hidden is None else hidden,
        like.new_empty(0) if weight is None else weight,
        like.new_empty(0, dtype=opmath) if bias is None else bias,
        like.new_empty(0, dtype=opmath) if scale is None else scale,
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, ctx.wanted, ctx.choices = inputs[:6], inputs[6], inputs[7:]
    ctx.save_for_backward(*tensors, output[1], *output[4:])


def _backward(ctx: Any, of_loss: Tensor, of_lse: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, lse = ctx.saved_tensors[:7]
    made = list(ctx.saved_tensors[7:])
    settings = Settings(*ctx.choices)
    late = list(ctx.wanted)
    if settings.early and not settings.want_stats:
        late = [False, late[1] and settings.mode == "recompute", False, False]
    results = [g if is_late else g * of_loss for g, is_late in zip(made, late, strict=True)]
    if any(late):
        again = linear_cross_entropy_backward(
            *tensors, lse, of_loss, of_lse if settings.want_stats else None, late, *ctx.choices
        )
        results = [a if is_late else r for a, r, is_late in zip(again, results, late, strict=True)]
    by_tensor: list[Tensor | None] = []
    for gradient, tensor, is_wanted in zip(results, tensors[:4], ctx.wanted, strict=True):
        by_tensor.append(gradient.to(tensor.dtype).view(tensor.shape) if is_wanted else None)
    return (*by_tensor, *[None] * 15)


linear_cross_entropy_forward.register_autograd(_backward, setup_context=_setup_context)
