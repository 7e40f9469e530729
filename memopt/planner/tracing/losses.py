"""The loss of a traced step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from memopt.planner.tracking import tensors_in

LossFn = Callable[..., Any]


class TraceError(ValueError):
    """A model that could not be traced; the message names the module it failed in and the shapes it was given."""


def find_loss(output: Any, loss_fn: LossFn | None) -> Tensor:
    """The scalar to differentiate: of ``loss_fn``, or found in the model's output; several are added."""
    found = _default_loss(output) if loss_fn is None else loss_fn(output)
    parts = list(tensors_in(found))
    if not parts:
        raise TraceError(f"no loss: loss_fn returned {type(found).__name__}; it must return a scalar tensor")
    total = parts[0] if parts[0].dim() == 0 else parts[0].sum()
    for part in parts[1:]:
        total = total + (part if part.dim() == 0 else part.sum())
    return total


def _default_loss(output: Any) -> Tensor:
    if isinstance(output, Tensor) and output.dim() == 0:
        return output
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    for tensor in tensors_in(dict(output) if isinstance(output, Mapping) else output):
        if tensor.is_floating_point():
            return tensor.mean()
    raise TraceError(f"no loss: the model returned {type(output).__name__} without a floating tensor; give loss_fn")
