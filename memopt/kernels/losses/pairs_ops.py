"""The two kernels of the contrastive loss beside ``logit_statistics``, registered with torch.library.

For raw similarities x and z = scale * x, ``column_statistics_`` keeps running maxima and sums of exp(z - maximum) down
the columns; ``pair_gradient_`` writes over x the gradient of a multiple of the sum of all rows' and columns' losses.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from memopt.kernels.backend import choose_backend
from memopt.kernels.losses import pairs_native, pairs_torch


@torch.library.custom_op("memopt::column_statistics_", mutates_args=("highest", "total"))
def column_statistics_(highest: Tensor, total: Tensor, similarities: Tensor, scale: Tensor) -> None:
    """Merges (R, C) ``similarities`` into (C,) ``highest`` and ``total``, which start at minus infinity and zero."""
    _implementation(similarities).column_statistics_(highest, total, similarities, scale)


@column_statistics_.register_fake
def _(highest: Tensor, total: Tensor, similarities: Tensor, scale: Tensor) -> None:
    return None


@torch.library.custom_op("memopt::pair_gradient_", mutates_args=("similarities",))
def pair_gradient_(
    similarities: Tensor, rows: Tensor, columns: Tensor, target: Tensor, coefficient: Tensor, scale: Tensor
) -> Tensor:
    """Replaces (R, C) x by scale * (row probability + column probability - 2 * coefficient * [column == target]).

    A probability is weight * exp(z - highest), with highest and weight from ``rows`` (2, R) and ``columns`` (2, C);
    with a maximum for the one and coefficient / sum of exponentials for the other it is as exact as z is.
    ``target`` (R,) is the column of a row's pair, outside [0, C) where it is in another chunk. Returns the gradient
    with respect to ``scale`` by row, (R,).
    """
    use = _implementation(similarities)
    return use.pair_gradient_(  # type: ignore[no-any-return]
        similarities, rows, columns, target, coefficient, scale
    )


@pair_gradient_.register_fake
def _(
    similarities: Tensor, rows: Tensor, columns: Tensor, target: Tensor, coefficient: Tensor, scale: Tensor
) -> Tensor:
    return scale.new_empty((similarities.shape[0],))


def _implementation(similarities: Tensor) -> ModuleType:
    chosen = choose_backend(similarities.device)
    if chosen == "triton" and similarities.dtype != torch.float64 and similarities.stride(-1) == 1:
        from memopt.kernels.losses import pairs_triton

        return pairs_triton
    if chosen == "native" and pairs_native.available(similarities):
        return pairs_native
    return pairs_torch
