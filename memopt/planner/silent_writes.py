"""Batch norms that overwrite the running statistics without saying so in their schema."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_PLACES = {
    "aten::native_batch_norm": (3, 4, 5),
    "aten::cudnn_batch_norm": (3, 4, 5),
    "aten::miopen_batch_norm": (3, 4, 5),
}


def silent_writes(name: str, args: Sequence[Any]) -> list[Any]:
    """The arguments that an operation of this qualified name overwrites in training, beside those its schema names."""
    if name not in _PLACES:
        return []
    mean, variance, training = _PLACES[name]
    return [args[mean], args[variance]] if len(args) > training and args[training] else []
