"""Random projection of a linear layer's input onto an eighth of its width, as in "CompAct" (sections 3 and 4).

Kept: Z = X P with P (width, width/8) of independent N(0, 8/width) entries, drawn anew for each storage by a generator
of its own. Brought back: Z P^T, whose mean over P is X. So the weight gradient dY^T X is unbiased, with a variance of
about width / rank times that of an exact one; CompAct keeps the gradient in the small space instead, which is the
optimizer's business. Meant for linear inputs only: a non-linear function of what comes back would be biased. An element
takes 1/8 of its bytes.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from memopt.offload.formats.format import Decoder, Format, closed_over

_SHARE = 8
_seeds = itertools.count(1)


class Projection(Format):
    """A Gaussian sketch."""

    def encode(self, flat: Tensor, width: int, signs: bool) -> Decoder | None:
        """The projected rows; None where there are no rows of at least 8 floating-point elements."""
        if not flat.is_floating_point() or width < _SHARE or flat.numel() % width:
            return None
        seed = next(_seeds)
        small = flat.view(-1, width) @ _directions(width, seed, flat)
        return closed_over(_decode, small, width, seed)


def _directions(width: int, seed: int, like: Tensor) -> Tensor:
    rank = width // _SHARE
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(width, rank, generator=generator, device=like.device).mul_(rank**-0.5).to(like.dtype)


def _decode(small: Tensor, width: int, seed: int) -> Tensor:
    return (small @ _directions(width, seed, small).t()).view(-1)
