"""How a runtime tells the meter that it is bringing saved tensors back, so that these count as activations."""

from __future__ import annotations

_depth = 0


class restoring:  # noqa: N801
    """Inside, storages that backward allocates are activations: fetched, decompressed or recomputed ones.

    A class, because it is entered for every saved tensor: a generator's context costs more than what it does.
    """

    def __enter__(self) -> None:
        global _depth
        _depth += 1

    def __exit__(self, *error: object) -> None:
        global _depth
        _depth -= 1


def is_restoring() -> bool:
    """Whether saved tensors are being brought back now."""
    return _depth > 0
