"""What is asked of gradients before a step changes anything."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from memopt.optim import sharding


def require_dense(params: Iterable[Tensor], optimizer: str) -> None:
    """Refuse sparse gradients.

    Raises:
        RuntimeError: a parameter has one.
    """
    for param in params:
        if param.grad is not None and param.grad.layout is not torch.strided:
            raise RuntimeError(
                f"{optimizer} got a sparse gradient for a parameter of shape {tuple(param.shape)}; "
                "it takes dense gradients (for an embedding, sparse=False)"
            )


def any_nonfinite(grads: Sequence[Tensor], params: Iterable[Tensor]) -> bool:
    """Whether one of these gradients holds a NaN or an infinity, on any of the ranks that share ``params``.

    Reads every gradient once, and waits for the device. Where parameters are sharded all ranks must call it.
    """
    if not grads:
        return False
    parts = map(sharding.local_of, grads)
    largest = torch.stack([g.abs().amax().float().cpu() for g in parts if g.numel()] or [torch.zeros(())])
    bad = (~torch.isfinite(largest).all()).float()
    for param in params:
        if sharding.is_sharded(param):  # ranks see different parts and must decide alike
            sharding.reduce_max(bad := bad.to(sharding.local_of(param).device), param)
            break
    return bool(bad)
