"""A tensor that stands in for a value which is not there: shape, strides and device, but no data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memopt.offload.errors import ReplayError
from memopt.offload.replay.tape import Chain
from memopt.offload.template import Layout


class StandIn(Tensor):
    """Lies over a chain of the tape instead of a storage; only the replay that made it can work with it."""

    __slots__ = ("chain", "laid")
    chain: Chain
    laid: Layout
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise ReplayError(
            f"{func} was given a tensor that a replayed block left behind; such a tensor has no data. Do "
            "not keep tensors that a block's forward, or a hook inside it, makes in lists or globals: backward runs "
            "both again; or keep this block out of the plan"
        )


def stand_in(layout: Layout, chain: Chain) -> StandIn:
    """A new stand-in over a chain."""
    size, stride, offset, dtype, device = layout
    # By position: twice as fast as by name.
    made: StandIn = Tensor._make_wrapper_subclass(StandIn, size, stride, offset, None, dtype, torch.strided, device)
    made.chain, made.laid = chain, layout
    return made
