"""What autograd saves in a trace, held without its storage: so the trace sees when forward's own code lets go of it.

A plan frees a saved storage when nobody but autograd needs it. Who else does cannot be read off operations: local
variables of a forward that still runs hold tensors that nothing will read again.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from memopt.planner.tracking import Record


class Held:
    """A saved tensor's layout, and its claim on the record of its storage."""

    __slots__ = ("_layout", "_mode", "_number", "_of", "record")

    def __init__(self, tensor: FakeTensor, record: Record, number: int, of: Holding) -> None:
        self._layout = tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.fake_device
        self._mode, self._of, self.record, self._number = tensor.fake_mode, of, record, number
        of.held[record.id] += 1

    def tensor(self) -> Tensor:
        """A fake tensor of the same layout, over a storage of its own."""
        size, stride, offset, dtype, device = self._layout
        nbytes = self._of.storage_bytes[self.record.id]
        with _disable_current_modes(), self._mode:
            flat = torch.empty(nbytes, dtype=torch.uint8, device=device)
            flat = flat[: nbytes // dtype.itemsize * dtype.itemsize].view(dtype)
            return flat.as_strided(size, stride, offset)

    def __del__(self) -> None:
        self._of.held[self.record.id] -= 1
        self._of.released(self.record, self._number)


class Holding:
    """Counts what keeps each saved storage alive: storages that stand for it, and what autograd holds.

    Args:
        died: called with a record that nothing keeps alive any more.
        clock: the number of the operation that comes next.
    """

    def __init__(self, died: Callable[[Record], None], clock: Callable[[], int]) -> None:
        self.held: Counter[int] = Counter()
        self.bodies: Counter[int] = Counter()
        self.storage_bytes: dict[int, int] = {}
        self._until: defaultdict[int, dict[int, int]] = defaultdict(dict)
        self._died, self._clock = died, clock
        self.closed = False

    def hold(self, tensor: Tensor, record: Record, number: int) -> Any:
        """What autograd gets for a tensor: a ``Held`` one, or itself where a layout does not say all."""
        if type(tensor) is not FakeTensor or tensor.layout is not torch.strided or tensor.is_conj() or tensor.is_neg():
            return tensor
        if record.id not in self.storage_bytes:
            self.storage_bytes[record.id] = tensor.untyped_storage().nbytes()
            self.bodies[record.id] = 1
        return Held(tensor, record, number, self)

    def body_died(self, record: Record) -> bool:
        """A storage of the record has gone; whether the record lives on."""
        if record.id not in self.storage_bytes:
            return False
        self.bodies[record.id] -= 1
        return self.bodies[record.id] > 0 or self.held[record.id] > 0

    def released(self, record: Record, number: int) -> None:
        """Autograd has let go of the tensor that was saved under this number."""
        self._until[record.id][number] = self._clock()
        if not self.closed and self.held[record.id] == 0 and self.bodies[record.id] == 0:
            self._died(record)

    def until(self, record: int, own: Collection[int]) -> int:
        """When autograd has let go of a storage, but for what was saved under these numbers; 0 where that is all."""
        return max((time for number, time in self._until[record].items() if number not in own), default=0)
