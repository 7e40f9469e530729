"""What ``python -m benchmarks.gpu`` checks and times: every module here offers ``cases(place)``."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Place:
    """Where the cases run, and whether only to walk through them at tiny sizes."""

    device: torch.device
    tiny: bool

    def size(self, full: int, tiny: int) -> int:
        """A size for a real run, or for a walk through."""
        return tiny if self.tiny else full


@dataclass
class Case:
    """One kernel to check and time.

    Args:
        name: what the table calls it.
        run: the timed call; what it needs is allocated when ``prepare`` made the case.
        check: raises AssertionError where the result differs from the plain torch implementation's.
        floor_bytes, floor_flops: what the call moves or computes at least.
        peers: other implementations of the same work, by name; each makes its own data and returns the timed call.
    """

    name: str
    run: Callable[[], object]
    check: Callable[[], None]
    floor_bytes: int = 0
    floor_flops: int = 0
    peers: dict[str, Callable[[], Callable[[], object]]] = field(default_factory=dict)


def collect(place: Place) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Names and makers of all cases; a maker allocates the case's data, so keep one case at a time."""
    for module in pkgutil.iter_modules(__path__):
        yield from importlib.import_module(f"{__name__}.{module.name}").cases(place)
