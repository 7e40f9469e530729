"""What surrounds a block's forward and must be the same when it is replayed: autocast, random state, training mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from operator import is_

import torch
from torch import Tensor, nn

Autocast = tuple[tuple[str, bool, torch.dtype], ...]


def autocast_state(device_type: str) -> Autocast:
    """Which autocasts are on, for the CPU and the device."""
    kinds = ("cpu",) if device_type == "cpu" else ("cpu", device_type)
    return tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds)


@contextmanager
def autocast(state: Autocast) -> Iterator[None]:
    """Runs its body under these autocasts, without the cache of weights: a replay must cast them itself."""
    before = autocast_state(state[-1][0])
    cached = torch.is_autocast_cache_enabled()
    try:
        torch.set_autocast_cache_enabled(False)
        for kind, enabled, dtype in state:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)
        for kind, enabled, dtype in before:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)


class uncached:  # noqa: N801
    """Runs its body without autocast's cache of weights, which would hold their casts until autocast ends.

    A class, because it is entered for every call of a block.
    """

    __slots__ = ("_before",)

    def __enter__(self) -> None:
        self._before = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)

    def __exit__(self, *error: object) -> None:
        torch.set_autocast_cache_enabled(self._before)


class cached_here:  # noqa: N801
    """Runs its body with a cache of weights of its own: tiles of one call share the casts, which go when it ends."""

    __slots__ = ()

    def __enter__(self) -> None:
        torch.clear_autocast_cache()

    def __exit__(self, *error: object) -> None:
        torch.clear_autocast_cache()


@contextmanager
def no_autocast() -> Iterator[None]:
    """Runs its body as recorded operations must run: what autocast had to cast is already cast."""
    on = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    try:
        for kind in on:
            torch.set_autocast_enabled(kind, False)
        yield
    finally:
        for kind in on:
            torch.set_autocast_enabled(kind, True)


@contextmanager
def attributes_restored(block: nn.Module, training: bool) -> Iterator[None]:
    """Runs its body with the block in training mode or not; afterwards every module's own attributes are as before.

    A forward may store tensors on its modules; what a replay stores there has no values and must not stay.
    """
    modules: list[nn.Module] = []
    todo = [block]
    while todo:
        module = todo.pop()
        modules.append(module)
        todo.extend(child for child in module._modules.values() if child is not None)
    before = [dict(module.__dict__) for module in modules]
    buffers = [dict(module._buffers) if module._buffers else None for module in modules]
    try:
        if block.training != training:
            block.train(training)
        yield
    finally:
        for module, members, table in zip(modules, before, buffers, strict=True):
            if table is not None:
                module._buffers.clear()
                module._buffers.update(table)
            now = module.__dict__
            if now.keys() != members.keys() or not all(map(is_, now.values(), members.values())):
                now.clear()
                now.update(members)


Generators = tuple[torch.Generator, ...]


def default_generators(devices: set[torch.device]) -> Generators:
    """The generators that random operations on these devices draw from when they are not given one."""
    found = [torch.default_generator]
    for device in sorted(devices, key=str):
        if device.type == "cuda":
            found.append(torch.cuda.default_generators[device.index or 0])
    return tuple(found)


def random_states(generators: Generators) -> list[Tensor]:
    """A copy of each generator's state."""
    return [generator.get_state() for generator in generators]


def set_random_states(generators: Generators, states: list[Tensor]) -> None:
    """Puts the states back."""
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)
