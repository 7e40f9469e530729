"""What autograd holds instead of a saved tensor: small objects that give it back.

All of them live exactly as long as autograd wants the saved tensor, so that whatever a plan holds for a tensor is freed
with it, in normal backward and after an exception alike. None of them refers to the call's inputs unless it must
recompute.
"""

from __future__ import annotations

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from memopt.offload.template import Layout


def changed_in_place(where: str, tensor: Tensor, version: int) -> RuntimeError:
    """The error that autograd itself would raise; it does not check versions where hooks are used."""
    return RuntimeError(
        f"one of the variables needed for gradient computation has been modified by an inplace operation: a tensor of "
        f"shape {tuple(tensor.shape)} that block {where} saved is at version {tensor._version}; expected version "
        f"{version}"
    )


class Kept:
    """The tensor itself."""

    __slots__ = ("__weakref__", "tensor", "version", "where")

    def __init__(self, tensor: Tensor, where: str) -> None:
        # An operation's own output leads to the operation, which holds this: a cycle that nothing would ever free.
        self.tensor = tensor if tensor.is_leaf else tensor.detach()
        self.version, self.where = tensor._version, where

    def unpack(self) -> Tensor:
        """The tensor, unless it has been overwritten."""
        if self.tensor._version != self.version:
            raise changed_in_place(self.where, self.tensor, self.version)
        return self.tensor


class Stored:
    """A storage that is somewhere else between forward and backward, in whole; shared by the tensors over it.

    Subclasses implement ``fetch``: a flat uint8 tensor of the storage's bytes, on its own device. The fetched storage
    is held until every tensor over it has been handed out, then by whoever uses them alone. ``is_source`` says that
    replays read it too, at any time until the last tensor over it is done with.
    """

    def __init__(self, tensor: Tensor, where: str) -> None:
        self.where = where
        self.bytes = tensor.untyped_storage().nbytes()
        self.device = tensor.device
        self._identity = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        self._flat: Tensor | None = None
        self._handed: set[int] = set()
        self._complete = False
        self.pieces = 0
        self.is_source = False

    def is_of(self, tensor: Tensor) -> bool:
        """Whether this is the storage of a tensor."""
        return bool(self._identity.cdata == tensor.untyped_storage()._cdata)

    def fetch(self) -> Tensor:
        """Bring the bytes back."""
        raise NotImplementedError

    def peek(self) -> Tensor:
        """The bytes for a replay; they stay for the tensors that are still to be handed out, if there are any."""
        if self._flat is None and self._complete:
            return self.fetch()
        if self._flat is None:
            self._flat = self.fetch()
        return self._flat

    def begin(self) -> Tensor:
        """The bytes, held here until the last of the tensors has been handed out."""
        self._complete = False
        return self.peek()

    def handed(self, piece: int) -> None:
        """One of the tensors has been handed out; after the last one the bytes are no longer held here."""
        self._handed.add(piece)
        if len(self._handed) == self.pieces:
            self._flat, self._complete = None, True
            self._handed.clear()


class Piece:
    """A tensor over a stored storage."""

    __slots__ = ("__weakref__", "layout", "number", "stored")

    def __init__(self, stored: Stored, tensor: Tensor) -> None:
        self.stored, self.layout, self.number = stored, Layout.of(tensor), stored.pieces
        stored.pieces += 1

    def unpack(self) -> Tensor:
        """The tensor over the storage, brought back."""
        tensor = self.begin()
        self.stored.handed(self.number)
        return tensor

    def begin(self) -> Tensor:
        """The same, while the storage still counts as not handed out."""
        return self._over(self.stored.begin())

    def peek(self) -> Tensor:
        """The tensor for a replay that reads it on the way to others."""
        return self._over(self.stored.peek())

    def _over(self, flat: Tensor) -> Tensor:
        dtype = self.layout.dtype
        return self.layout.over(flat if flat.dtype == dtype else flat.view(dtype))


class Leaving(Kept):
    """A tensor over a block's input: kept until the block's forward has ended, then in a tier."""

    __slots__ = ("_piece",)

    def __init__(self, tensor: Tensor, where: str) -> None:
        super().__init__(tensor, where)
        self._piece: Piece | None = None

    def leave(self, stored: Stored) -> None:
        """The storage has been moved; an overwritten tensor stays, for ``unpack`` to tell."""
        if self.tensor._version == self.version:
            self._piece = Piece(stored, self.tensor)
            del self.tensor

    def unpack(self) -> Tensor:
        """The tensor, from the tier if it has gone."""
        return super().unpack() if self._piece is None else self._piece.unpack()
