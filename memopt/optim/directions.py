"""Random directions that are drawn again whenever they are needed, and random numbers that repeat.

What zeroth-order training keeps of a direction is its seed: nothing of a parameter's size exists at once.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from memopt.optim.sharding import local_of, offset_of

CHUNK = 1 << 20  # elements of a direction that exist at once


def direction(param: Tensor, key: str) -> Iterator[tuple[Tensor, Tensor]]:
    """(part of the parameter, a standard normal direction there in fp32), piece by piece.

    The same ``key`` gives the same direction; of a sharded parameter every rank draws its own part. A parameter that is
    not contiguous comes in one piece.
    """
    local = local_of(param)
    draw = torch.Generator(device=local.device)
    draw.manual_seed(random.Random(f"{key}/{offset_of(param)}").getrandbits(63))
    if not local.is_contiguous():
        yield local, torch.randn(local.shape, generator=draw, device=local.device)
        return
    flat = local.view(-1)
    for first in range(0, flat.numel(), CHUNK):
        part = flat[first : first + CHUNK]
        yield part, torch.randn(part.shape, generator=draw, device=local.device)


class SameNoise:
    """Lets every evaluation of a step draw the same random numbers, so that dropout does not enter the difference."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._cpu = torch.get_rng_state()
        self._others = {}
        for device in {local_of(p).device for p in params}:
            if device.type != "cpu":
                self._others[device] = torch.get_device_module(device).get_rng_state(device)

    def rewind(self) -> None:
        """Set every generator back to where it was."""
        torch.set_rng_state(self._cpu)
        for device, state in self._others.items():
            torch.get_device_module(device).set_rng_state(state, device)
