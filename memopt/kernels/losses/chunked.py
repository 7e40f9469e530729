"""Any loss on logits, a chunk of rows at a time: for distillation, preference and policy losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from memopt.kernels.losses.checks import (
    autocast_dtype,
    autocast_off,
    check_dense,
    check_pair,
    refuse_second_derivatives,
)
from memopt.kernels.losses.settings import Settings, rows_per_chunk
from memopt.kernels.losses.weight_gradient import HeldGradient, WeightGradient

_CHUNK_BYTES = 32 * 2**20


@torch.compiler.disable  # type: ignore[untyped-decorator]
def chunked_loss(
    fn: Callable[..., Tensor],
    hidden: Tensor,
    weight: Tensor,
    *rows: Tensor,
    bias: Tensor | None = None,
    shared: Sequence[Tensor] = (),
    chunk_bytes: int | None = None,
    accumulate: str = "once",
) -> Tensor:
    """The sum of ``fn`` over chunks of the first dimension, logits and gradients made one chunk at a time.

        loss = sum over chunks c of fn(hidden[c] @ weight.T + bias, *(r[c] for r in rows), *shared)

    so ``fn`` must itself be a sum over that dimension, such as ``F.cross_entropy(logits, target, reduction="sum")``.
    A loss over whole sequences takes ``hidden`` of shape (B, T, H): a chunk then holds whole sequences. Gradients are
    made in forward; torch's own autograd differentiates ``fn``.

    Args:
        fn: gets logits (n, ..., V) in float32 (float64 for float64), the chunks of ``rows`` and ``shared``; returns a
            scalar. Tensors that it takes from elsewhere get no gradient: pass them through ``rows`` or ``shared``.
        hidden: (N, ..., H). weight: (V, H), the dtype of ``hidden``. bias: (V,).
        rows: tensors with first dimension N: targets, masks, a teacher's hidden states.
        shared: tensors every chunk gets whole: a temperature, a teacher's weight.
        chunk_bytes: logits of a chunk in the dtype of ``hidden``; 32 MiB unless given. ``fn`` may need several times.
        accumulate: how the weight's gradient is made from chunks. "once": in 16 bits each element is rounded once. Up
            to H positions beside those of the last chunk wait in the gradient's own memory; more are summed in float32.
            "weight" adds in the weight's dtype, with an error of about sqrt((K + 1) / 2) roundings for K chunks, as
            "once" does in float32. "float32" adds in 4 more bytes per weight element.

    Returns:
        The scalar sum. Every floating input that requires a gradient gets one.

    Raises:
        ValueError, TypeError: inputs that do not fit, or a result of ``fn`` that is not a scalar.
        RuntimeError: a second backward, a second derivative, or a transform of ``torch.func``.

    torch.compile leaves the call to eager mode.

    Cost: a chunk of logits, what ``fn`` makes of it, and in 16 bits with more than H positions beside the last chunk 4
    bytes per weight element unless ``accumulate`` is "weight". Time of three products.
    """
    if torch._C._functorch.get_interpreter_stack() is not None:
        raise RuntimeError(
            "chunked_loss differentiates fn itself, so not under torch.func; use backward or autograd.grad"
        )
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if not isinstance(tensor, Tensor) and not (name == "bias" and tensor is None):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor is not None:
            check_dense(name, tensor)
            if tensor.device != hidden.device:
                raise ValueError(f"{name} is on {tensor.device}, but hidden is on {hidden.device}; move it there")
    if not callable(fn):
        raise TypeError(f"fn must be a function of a chunk of logits, got {type(fn).__name__}")
    check_pair(hidden, weight)
    if hidden.dim() < 2:
        raise ValueError(f"hidden must have shape (N, ..., H), got {tuple(hidden.shape)}")
    N, V = hidden.shape[0], weight.shape[0]
    for index, tensor in enumerate(rows):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"rows[{index}] must be a tensor, got {type(tensor).__name__}; pass constants through fn")
        if tensor.dim() == 0 or tensor.shape[0] != N:
            raise ValueError(f"rows[{index}] must have first dimension {N} as hidden, got {tuple(tensor.shape)}")
    if bias is not None and tuple(bias.shape) != (V,):
        raise ValueError(f"bias must have shape ({V},), got {tuple(bias.shape)}")
    settings = Settings(chunk_bytes=_CHUNK_BYTES if chunk_bytes is None else chunk_bytes, accumulate=accumulate)
    if (cast := autocast_dtype(hidden.device)) is not None:
        hidden, weight = hidden.to(cast), weight.to(cast)
    call = _Call(fn, settings, len(rows), torch.is_grad_enabled())
    loss: Tensor = _ChunkedLoss.apply(call, hidden, weight, bias, *rows, *shared)  # type: ignore[no-untyped-call]
    return loss


@dataclass
class _Call:
    """One call on its way to backward; ``made`` holds its gradients for an upstream gradient of one."""

    fn: Callable[..., Tensor]
    settings: Settings
    row_count: int
    recorded: bool
    made: list[Tensor | None] | None = field(default=None)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, hidden: Tensor, weight: Tensor, bias: Tensor | None, *others: Tensor) -> Tensor:
        needed = ctx.needs_input_grad[1:] if call.recorded else (False,) * (3 + len(others))
        with autocast_off(hidden.device):
            loss, call.made = _walk(call, needed, hidden, weight, bias, others)
        ctx.call = call
        return loss

    @staticmethod
    def backward(ctx: Any, of_loss: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives("chunked_loss")
        made, ctx.call.made = ctx.call.made, None
        if made is None:
            raise RuntimeError(
                "chunked_loss made its gradients in forward and has handed them over: backward runs once"
            )
        return (None, *(None if gradient is None else gradient.mul_(of_loss) for gradient in made))


def _walk(
    call: _Call, needed: Sequence[bool], hidden: Tensor, weight: Tensor, bias: Tensor | None, others: tuple[Tensor, ...]
) -> tuple[Tensor, list[Tensor | None]]:
    """The loss and the gradients of hidden, weight, bias and the others, None where not needed."""
    rows, shared = others[: call.row_count], others[call.row_count :]
    N, V = hidden.shape[0], weight.shape[0]
    opmath = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    loss = torch.zeros((), dtype=opmath, device=hidden.device)
    made: list[Tensor | None] = [
        None if not n else torch.zeros_like(t) for n, t in zip(needed[3:], others, strict=True)
    ]
    of_hidden = torch.empty_like(hidden) if needed[0] else None
    of_bias = torch.zeros(V, dtype=opmath, device=hidden.device) if bias is not None and needed[2] else None
    positions = hidden[0].numel() // max(1, hidden.shape[-1]) if N else 1
    step = rows_per_chunk(N, positions * V * hidden.element_size(), call.settings.chunk_bytes)
    last = (N - (N - 1) // step * step) * positions
    sink = _sink(call.settings, hidden, weight, last) if needed[1] else None
    for first in range(0, N, step):
        part = slice(first, min(first + step, N))
        h = hidden[part]
        logits = (h @ weight.t()).requires_grad_(any(needed))
        arguments = [t[part].detach().requires_grad_(n) for t, n in zip(rows, needed[3:], strict=False)]
        arguments += [t.detach().requires_grad_(n) for t, n in zip(shared, needed[3 + len(rows) :], strict=True)]
        with torch.set_grad_enabled(any(needed)):
            final = logits.to(opmath) if bias is None else logits.to(opmath) + bias.detach().to(opmath)
            value = call.fn(final, *arguments)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"fn must return a scalar tensor, the sum over its chunk; got {got}")
        loss += value.detach().reshape(()).to(opmath)
        if not any(needed):
            continue
        sources = [logits, *(a for a, n in zip(arguments, needed[3:], strict=True) if n)]
        d, *rest = _differentiate(value, sources)
        if d is None:
            d = torch.zeros_like(logits, requires_grad=False)
        del final, value, logits, sources
        _collect(made, rest, needed[3:], call.row_count, part)
        d_rows, h_rows = d.reshape(-1, V), h.reshape(-1, h.shape[-1])
        if of_hidden is not None:
            of_hidden[part] = (d_rows @ weight).view_as(h)
        if sink is not None:
            sink.add(d_rows, h_rows)
        if of_bias is not None:
            of_bias += d_rows.sum(0, dtype=opmath)
    bias_gradient = None if of_bias is None or bias is None else of_bias.to(bias.dtype)
    return loss, [of_hidden, None if sink is None else sink.finish(), bias_gradient, *made]


def _sink(settings: Settings, hidden: Tensor, weight: Tensor, last: int) -> WeightGradient | HeldGradient:
    """Where chunks of the weight's gradient go; the last chunk has ``last`` positions."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    if settings.accumulate != "once" or hidden.element_size() != 2 or rows.shape[0] <= last:
        return WeightGradient(weight, settings)
    if rows.shape[0] - last <= rows.shape[1]:
        return HeldGradient(weight, rows, last, settings.chunk_bytes // 8)
    return WeightGradient(weight, replace(settings, accumulate="float32"))


def _differentiate(value: Tensor, sources: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Gradients of a scalar with respect to ``sources``, None where it does not depend on one."""
    if not value.requires_grad:
        return [None] * len(sources)
    return torch.autograd.grad(value, sources, value.new_ones(value.shape), allow_unused=True)


def _collect(
    made: list[Tensor | None], rest: Sequence[Tensor | None], needed: Sequence[bool], row_count: int, part: slice
) -> None:
    """Puts a chunk's gradients of the other arguments where they belong: a slice of rows, or a sum."""
    gradients = iter(rest)
    for index, is_needed in enumerate(needed):
        gradient = next(gradients) if is_needed else None
        target = made[index]
        if gradient is None or target is None:
            continue
        if index < row_count:
            target[part] = gradient
        else:
            target += gradient
