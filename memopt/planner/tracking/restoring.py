"""How a runtime tells the meter that it is bringing saved tensors back, so that these count as activations."""

from __future__ import annotations

import threading


class _Here(threading.local):
    """How many are open on this thread."""

    depth = 0


_here = _Here()


class restoring:  # noqa: N801
    """Inside, storages that backward allocates are activations: fetched, decompressed or recomputed ones.

    A class, because it is entered for every saved tensor: a generator's context costs more than what it does.
    """

    def __enter__(self) -> None:
        _here.depth += 1

    def __exit__(self, *error: object) -> None:
        _here.depth -= 1


def is_restoring() -> bool:
    """Whether this thread is bringing saved tensors back now."""
    return _here.depth > 0
