"""Running a module in tiles along an axis on which it treats every position alike, and attention by query blocks.

Chunked feed-forward and query blocks are the two halves of "Blockwise Parallel Transformer"; that the axis is found by
trying is AutoChunk's idea. A tile is a call of the module: when the module is under a plan (apply it first), every tile
has its own actions, so that one tile may be swapped and the next recomputed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import checkpoint

from memopt.offload.ambient import uncached
from memopt.planner.tiles import run_in_tiles

_SLACK = 64
_TRIED = 16  # positions that a plan's tiles are tried with


class Tiled:
    """A ``module`` that runs in ``chunks`` tiles along ``dim``, until ``remove()``; also a context manager.

    :func:`memopt.offload.tile` makes it, and so does a plan with tiles; ``recompute`` says that backward runs each tile
    again. ``refuse`` comes from a plan: it is called with what is wrong, where the first call that trains shows that
    the module does not treat positions alike.
    """

    def __init__(
        self,
        module: nn.Module,
        chunks: int,
        dim: int,
        recompute: bool = False,
        refuse: Callable[[str], None] | None = None,
    ) -> None:
        self.module, self.chunks, self.dim, self.recompute = module, chunks, dim, recompute
        self.of_plan, self._refuse = refuse is not None, refuse
        self.own: Callable[..., Any] = module.forward
        self._was_attribute = module.__dict__.get("forward")
        module.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The module's output, tile by tile.

        Raises:
            TypeError: there is no positional tensor to cut.
        """
        if not args or not isinstance(args[0], Tensor):
            raise TypeError(
                f"{type(self.module).__name__} runs in tiles: give the tensor to be cut as its first positional "
                f"argument; got {len(args)} positional ones and {', '.join(kwargs) or 'no keywords'}"
            )
        if self._refuse is not None and torch.is_grad_enabled():
            refuse, self._refuse = self._refuse, None
            # Not for the recorder of the block around it, nor for the cache of casts, which would lack gradients.
            with _disable_current_modes(), uncached():
                few = args[0].narrow(self.dim, 0, min(_TRIED, args[0].shape[self.dim]))
                if not _same_in_tiles(self.module, self.own, (few, *args[1:]), kwargs, self.dim):
                    refuse(f"it gives another output when its input is cut along dimension {self.dim}")
        return self.over(self.own)(*args, **kwargs)

    def over(self, forward: Callable[..., Any]) -> Callable[..., Tensor]:
        """Another forward in these tiles."""
        if self.recompute and torch.is_grad_enabled():
            forward = partial(checkpoint, forward, use_reentrant=False)
        return partial(run_in_tiles, forward, self.chunks, self.dim)

    def remove(self) -> None:
        """Run the module whole again. Safe to repeat."""
        if self.module.__dict__.get("forward") is self:
            if self._was_attribute is None:
                del self.module.forward
            else:
                self.module.forward = self._was_attribute

    def __enter__(self) -> Tiled:
        return self

    def __exit__(self, *error: Any) -> None:
        self.remove()


def tile(
    module: nn.Module, chunks: int, *, inputs: tuple[Any, ...], dim: int | None = None, recompute: bool = True
) -> Tiled:
    """Make a module run in tiles: its first argument is cut, the tiles run one after another, outputs are joined.

    Without dropout, outputs are those of the whole call up to rounding (matrix products of other sizes may sum in
    another order); gradients of parameters are sums over the tiles. Dropout draws other numbers than in the whole call.

    Args:
        module: takes a tensor first, returns one tensor.
        chunks: how many tiles, at least 2.
        inputs: positional arguments of one call, to find the axis and to check it: one chunked call in evaluation mode
            is compared with the whole one.
        dim: the axis; by default the first axis that works, the tokens' (1) tried first, the last never.
        recompute: checkpoint every tile, so that only its input is kept. Without it the module's plan decides, or
            everything is kept.

    Returns:
        A handle with ``remove()``; the axis is in ``handle.dim``.

    Raises:
        ValueError: ``chunks`` is below 2, the inputs have no tensor first, or the module runs in tiles already; no
            axis, or not the given one, gives the same output.
    """
    if not isinstance(chunks, int) or chunks < 2:
        raise ValueError(f"chunks is {chunks!r}; a module is cut into a whole number of tiles, at least 2")
    if isinstance(module.__dict__.get("forward"), Tiled):
        raise ValueError(f"{type(module).__name__} runs in tiles already; take them off first with remove()")
    if not inputs or not isinstance(inputs[0], Tensor) or inputs[0].dim() < 2:
        raise ValueError("inputs must begin with the tensor of at least 2 dimensions that is to be cut")
    x = inputs[0]
    if dim is not None and not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim is {dim}; the input of shape {tuple(x.shape)} has {x.dim()} dimensions")
    candidates = [dim % x.dim()] if dim is not None else sorted(range(x.dim() - 1), key=lambda d: (d != 1, d))
    for axis in candidates:
        if x.shape[axis] >= 2 and _same_in_tiles(module, module, inputs, {}, axis):
            return Tiled(module, chunks, axis, recompute)
    tried = ", ".join(map(str, candidates))
    raise ValueError(
        f"{type(module).__name__} gives another output when its input of shape {tuple(x.shape)} is cut along dim "
        f"{tried}: it mixes positions there; tile a part of it that treats them alike"
    )


def _same_in_tiles(
    module: nn.Module, forward: Callable[..., Any], inputs: tuple[Any, ...], named: dict[str, Any], axis: int
) -> bool:
    """Whether two tiles give the whole's output: within a small multiple of rounding, of its largest element."""
    training = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            whole = forward(*inputs, **named)
            joined = run_in_tiles(forward, 2, axis, *inputs, **named)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return False
    finally:
        for m, mode in training:
            m.training = mode
    if not isinstance(whole, Tensor) or joined.shape != whole.shape:
        return False
    largest = whole.abs().max().double()
    return bool((joined.double() - whole.double()).abs().max() <= _SLACK * torch.finfo(whole.dtype).eps * largest)


def blockwise_attention(
    query: Tensor, key: Tensor, value: Tensor, chunks: int, *, is_causal: bool = False, scale: float | None = None
) -> Tensor:
    """Softmax attention, one block of queries at a time, each recomputed in backward.

    The scores of one block at most exist at a time: batch x heads x (queries / chunks) x keys elements, also where no
    flash attention is at hand. Under ``is_causal`` a block sees the keys up to its own last query only.

    Args:
        query: (..., queries, width).
        key: (..., keys, width).
        value: (..., keys, value width).
        chunks: blocks of queries.
        is_causal: query i sees key j where j - i <= keys - queries (aligned at the ends).
        scale: of the scores; by default 1 / sqrt(width).

    Raises:
        ValueError: ``chunks`` is below 1.
    """
    if chunks < 1:
        raise ValueError(f"chunks is {chunks}; give at least 1")
    queries, keys = query.shape[-2], key.shape[-2]
    pieces, start = [], 0
    for piece in query.chunk(chunks, -2):
        stop = start + piece.shape[-2]
        seen = max(1, min(keys, keys - queries + stop)) if is_causal else keys
        first = keys - queries + start if is_causal else None
        arguments = (piece, key[..., :seen, :], value[..., :seen, :], first, scale)
        if torch.is_grad_enabled():
            pieces.append(checkpoint(_block, *arguments, use_reentrant=False))
        else:
            pieces.append(_block(*arguments))
        start = stop
    return torch.cat(pieces, -2)


def _block(query: Tensor, key: Tensor, value: Tensor, first: int | None, scale: float | None) -> Tensor:
    mask = None
    if first is not None:
        rows = torch.arange(first, first + query.shape[-2], device=query.device)
        mask = rows[:, None] >= torch.arange(key.shape[-2], device=query.device)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
