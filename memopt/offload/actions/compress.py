"""Compress: the storage waits for backward in a smaller format, and comes back within that format's error."""

from __future__ import annotations

import torch
from torch import Tensor

from memopt.offload.actions.saver import BlockCall, Saver
from memopt.offload.formats import Format, format_named
from memopt.offload.formats.format import Decoder
from memopt.offload.handles import Kept, Piece, Stored
from memopt.planner.values import StorageAction


class Compressed(Stored):
    """A storage in a compression format."""

    def __init__(self, tensor: Tensor, where: str, decode: Decoder) -> None:
        super().__init__(tensor, where)
        self._decode = decode

    def fetch(self) -> Tensor:
        """The bytes, decoded."""
        return self._decode().view(torch.uint8)


class Compress(Saver):
    """Compresses each storage once; never the source of a replay, which would carry the error on.

    Args:
        format: how.
    """

    exact = False

    def __init__(self, format: Format) -> None:
        self.format = format

    def save(self, call: BlockCall, number: int, tensor: Tensor) -> Piece | Kept:
        """The first tensor over a storage compresses it; what the format cannot hold is kept."""
        index = call.storage_of(number)
        stored = call.stored.get(index)
        if stored is not None and stored.is_of(tensor):
            return Piece(stored, tensor)
        decode = self._encode(tensor, call.signs_only(number))
        if decode is None:
            return Kept(tensor, call.where)
        call.stored[index] = stored = Compressed(tensor, call.where, decode)
        return Piece(stored, tensor)

    def _encode(self, tensor: Tensor, signs: bool) -> Decoder | None:
        size = tensor.untyped_storage().nbytes()
        if size == 0 or size % tensor.element_size() or tensor.dtype.is_complex:
            return None
        flat = tensor.as_strided((size // tensor.element_size(),), (1,), 0)
        width = tensor.shape[-1] if tensor.dim() and tensor.is_contiguous() else 0
        with torch.no_grad():
            return self.format.encode(flat, width, signs)


def make(action: StorageAction) -> Compress:
    """The saver.

    Raises:
        ValueError: no such format.
    """
    return Compress(format_named(action.format))
