"""What ``python -m benchmarks.gpu`` checks and times: every module here offers ``cases(place)``."""

from __future__ import annotations

import contextlib
import importlib
import os
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
class Timed:
    """The timed call of a case, with its data allocated.

    Args:
        run: the call.
        floor_bytes, floor_flops: what it moves or computes at least.
        peers: other implementations of the same work, by name; each makes its own data and returns the timed call.
    """

    run: Callable[[], object]
    floor_bytes: int = 0
    floor_flops: int = 0
    peers: dict[str, Callable[[], Callable[[], object]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One kernel to check and time.

    Args:
        name: what the table calls it.
        check: raises AssertionError where the result differs from the plain torch implementation's; small data.
        prepare: allocates the data of the timed call.
        first: one of the figures the benchmark exists for: timed before the others.
    """

    name: str
    check: Callable[[], None]
    prepare: Callable[[], Timed]
    first: bool = False


def collect(place: Place) -> list[Case]:
    """All cases, those that matter most at the beginning."""
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    found: list[Case] = [case for module in modules for case in module.cases(place)]
    return sorted(found, key=lambda case: not case.first)


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """Runs memopt's torch implementations inside."""
    before = os.environ.get("MEMOPT_KERNELS")
    os.environ["MEMOPT_KERNELS"] = "torch"
    try:
        yield
    finally:
        del os.environ["MEMOPT_KERNELS"]
        if before is not None:
            os.environ["MEMOPT_KERNELS"] = before
