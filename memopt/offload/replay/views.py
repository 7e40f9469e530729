"""Views of stand-ins: other names for a storage that is not there, worked out without data."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from memopt.offload.replay.standin import StandIn, stand_in
from memopt.offload.template import Layout
from memopt.offload.trees import with_operands


@functools.cache
def is_view(func: Any) -> bool:
    """Whether an operator only gives other names to its first operand's storage."""
    returns = func._schema.returns
    return bool(returns) and not func._schema.is_mutable and all(r.alias_info is not None for r in returns)


def view_of(func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
    """The view of a stand-in, worked out without data."""
    base = next(tensor for tensor in tensors if isinstance(tensor, StandIn))
    reach = sum((size - 1) * stride for size, stride in zip(base.shape, base.stride(), strict=True))
    flat = torch.empty(base.storage_offset() + reach + 1, dtype=base.dtype, device="meta")
    bare = flat.as_strided(base.shape, base.stride(), base.storage_offset())
    new_args, new_kwargs = with_operands(args, kwargs, [bare if t is base else t for t in tensors])
    output = func(*new_args, **new_kwargs)

    def one(item: Tensor) -> Tensor:
        return stand_in(Layout.of(item)._replace(device=base.device), base.chain)

    return type(output)(one(item) for item in output) if isinstance(output, (tuple, list)) else one(output)
