"""How a runtime tells the meter that it is bringing saved tensors back, so that these count as activations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_depth = 0


@contextmanager
def restoring() -> Iterator[None]:
    """Inside, storages that backward allocates are activations: fetched, decompressed or recomputed ones."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1


def is_restoring() -> bool:
    """Whether saved tensors are being brought back now."""
    return _depth > 0
