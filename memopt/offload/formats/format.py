"""What a compression format must offer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

Decoder = Callable[[], Tensor]


class Format:
    """Turns a whole storage, seen as a flat tensor of its element type, into something smaller and back."""

    def encode(self, flat: Tensor, width: int, signs: bool) -> Decoder | None:
        """Compress.

        Args:
            flat: (n,) the storage's elements.
            width: the length of the saved tensor's last dimension where it is contiguous, else 0.
            signs: backward only asks which elements are positive (the output of a ReLU that nothing else saves).

        Returns:
            What brings back n elements, of the same dtype or promising the same backward; None where this format cannot
            serve these values, which are then kept.
        """
        raise NotImplementedError


def closed_over(decode: Callable[..., Tensor], *state: Any) -> Decoder:
    """A decoder that holds its state and nothing else."""
    return lambda: decode(*state)
