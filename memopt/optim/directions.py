"""Random directions that are drawn again whenever they are needed, and random numbers that repeat.

What zeroth-order training keeps of a direction is its seed: nothing of a parameter's size exists at once.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Directions:
    """The directions of one step, and what losses along them say of the gradient.

    Args:
        key: tells them from those of other steps.
        samples: how many.
        numbers: the position of every parameter.
    """

    key: str
    samples: int
    numbers: Mapping[Tensor, int]

    def of(self, param: Tensor, sample: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(part of the parameter, the direction there in fp32), piece by piece."""
        return direction(param, f"{self.key}/{sample}/{self.numbers[param]}")

    def measure(
        self, loss: Callable[[], float], params: Sequence[Tensor], eps: float, sides: int
    ) -> tuple[list[float], list[float]]:
        """Losses, and per sample the slope along its direction from one or two sides, ``eps`` directions away.

        Parameters are as before, but for rounding, whether or not ``loss`` fails.
        """
        losses, slopes = [], []
        before = loss() if sides == 1 else 0.0
        for sample in range(self.samples):
            found, at = [], 0.0
            try:
                for place in (eps, -eps)[:sides]:
                    self._move(params, sample, place - at)
                    at = place
                    found.append(loss())
            finally:
                self._move(params, sample, -at)
            losses += found
            slopes.append((found[0] - before) / eps if sides == 1 else (found[0] - found[1]) / (2 * eps))
        return losses, slopes

    def gradient(self, param: Tensor, scales: Sequence[float]) -> Iterator[tuple[Tensor, Tensor]]:
        """(part, the sum of all directions there, each times its scale), piece by piece."""
        for pieces in zip(*(self.of(param, sample) for sample in range(self.samples)), strict=True):
            total = pieces[0][1].mul_(scales[0])
            for (_, z), scale in zip(pieces[1:], scales[1:], strict=True):
                total.add_(z, alpha=scale)
            yield pieces[0][0], total

    def _move(self, params: Sequence[Tensor], sample: int, distance: float) -> None:
        for param in params:
            for part, z in self.of(param, sample):
                part.add_(z, alpha=distance)


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
