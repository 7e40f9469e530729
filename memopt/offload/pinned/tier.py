"""The host tier on CUDA: pinned buffers, copy streams of their own, and prefetch in the order of backward.

Out: the copy stream waits for what has been computed so far, then copies. The storage is held until compute has waited
for that copy: at the end of the next block's forward, as the planner counts, or earlier where more than
``in_flight_bytes`` are on their way. The host must not look whether a copy has finished: it runs far ahead of the
device. In: when a storage is fetched, the copies of those that were put away before it are started as well, up to
``prefetch_bytes``, because backward asks in the opposite order of forward.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from weakref import ref

import torch
from torch import Tensor

from memopt.offload.errors import SwapError
from memopt.offload.pinned.pool import PinnedPool
from memopt.offload.tiers.tier import Slot, Tier, first_bytes

_MIB = 2**20


def _stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


def _event(timed: bool = False) -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=timed)  # type: ignore[no-untyped-call]


def _passed(event: torch.cuda.Event) -> bool:
    return bool(event.query())  # type: ignore[no-untyped-call]


class PinnedSlot(Slot):
    """One storage in pinned memory, on its way out, or on its way back."""

    def __init__(self, tier: PinnedTier, tensor: Tensor, moved_bytes: int | None, number: int) -> None:
        super().__init__(tensor, moved_bytes)
        self._tier, self.number = tier, number
        self._buffers = tier.take(self.moved_bytes)
        self._back: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None
        source = first_bytes(tensor, self.moved_bytes)
        out, _ = tier.streams(self.device)
        # The values must be complete before the copy reads them.
        out.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(out):
            for part, buffer in self._parts(source):
                buffer.copy_(part, non_blocking=True)
        self.left = _event()
        self.left.record(out)
        tier.leaving(self.left, source)
        tier.held_bytes += self.moved_bytes
        tier.moved_bytes += self.moved_bytes

    def _parts(self, flat: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The moved bytes of a storage, with the pinned bytes for each part of them."""
        start = 0
        for buffer in self._buffers:
            part = flat[start : min(start + buffer.numel(), self.moved_bytes)]
            yield part, buffer[: part.numel()]
            start += buffer.numel()

    def prefetch(self) -> None:
        """Start the copy to the device, unless it has been."""
        if self._back is not None:
            return
        tier = self._tier
        _, back = tier.streams(self.device)
        # Allocated on the compute stream, where it will be used and freed; the copy must not start before memory that
        # this allocation reuses has been read for the last time.
        self._back = self.empty()
        back.wait_stream(torch.cuda.current_stream(self.device))
        # The way out must be finished before the way back begins.
        back.wait_event(self.left)
        with torch.cuda.stream(back):
            for part, buffer in self._parts(self._back):
                part.copy_(buffer, non_blocking=True)
        self._arrived = _event()
        self._arrived.record(back)
        tier.ahead_bytes += self.storage_bytes

    def forget(self) -> None:
        """Let go of a copy that nobody asked for: its memory may be reused only after the copy into it."""
        if self._back is not None and self._arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(self._arrived)
            self._back = None
            self._tier.ahead_bytes -= self.storage_bytes

    def get(self) -> Tensor:
        """The bytes on the device; compute waits for their arrival, the host does not."""
        tier = self._tier
        tier.let_go(0)
        self.prefetch()
        assert self._back is not None
        assert self._arrived is not None
        back, self._back = self._back, None
        tier.ahead_bytes -= self.storage_bytes
        tier.wait(self._arrived, self.device)
        tier.prefetch_before(self)
        return back

    def __del__(self) -> None:
        if hasattr(self, "left"):
            self._tier.held_bytes -= self.moved_bytes
            self.forget()
            # The buffers may be handed out again only when both copies are done with them.
            for buffer in self._buffers:
                self._tier.retire(buffer, self._arrived or self.left)


class PinnedTier(Tier):
    """Pinned memory with two copy streams for each device.

    Args:
        limit_bytes: the most host memory to pin.
        in_flight_bytes: device memory that waits for copies out at most.
        prefetch_bytes: device memory filled ahead of need at most.
    """

    def __init__(
        self, limit_bytes: int | None, in_flight_bytes: int = 1024 * _MIB, prefetch_bytes: int = 512 * _MIB
    ) -> None:
        self.pool = PinnedPool(limit_bytes)
        self.in_flight_bytes, self.prefetch_bytes = in_flight_bytes, prefetch_bytes
        self.ahead_bytes = 0
        self._streams: dict[torch.device, tuple[torch.cuda.Stream, torch.cuda.Stream]] = {}
        self._leaving: deque[tuple[torch.cuda.Event, Tensor]] = deque()
        self._leaving_bytes = 0
        self._in_block = 0  # of the leaving ones, those that the block under way has put away
        self._order: dict[int, ref[PinnedSlot]] = {}
        self._next = 0
        self._retired: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        self._stalls: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def streams(self, device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
        """A device's streams for copies out and in; a copy on another device's stream would not wait for anything."""
        if device not in self._streams:
            with torch.cuda.device(device):
                self._streams[device] = _stream(), _stream()
        return self._streams[device]

    def take(self, size: int) -> list[Tensor]:
        """Pinned buffers; where there are no more, after waiting for those whose last copies are under way.

        Raises:
            SwapError: none are left to wait for.
        """
        while True:
            try:
                return self.pool.take(size)
            except SwapError:
                if not self._retired:
                    raise
            buffer, event = self._retired.popleft()
            event.synchronize()
            self.pool.give(buffer)

    def put(self, tensor: Tensor, moved_bytes: int | None = None) -> Slot:
        """Start the copy out."""
        self._collect()
        self._next += 1
        slot = PinnedSlot(self, tensor, moved_bytes, self._next)
        self._order[slot.number] = ref(slot)
        return slot

    def leaving(self, event: torch.cuda.Event, source: Tensor) -> None:
        """Hold a storage until its copy is done; over the limit, compute waits for the oldest copies."""
        self._leaving.append((event, source))
        self._leaving_bytes += source.numel()
        self._in_block += 1
        while self._leaving and (self._leaving_bytes > self.in_flight_bytes or _passed(self._leaving[0][0])):
            self.let_go(len(self._leaving) - 1)

    def let_go(self, rest: int) -> None:
        """Make compute wait for the oldest copies out, until so many are left, and hold their storages no longer."""
        while len(self._leaving) > rest:
            done, oldest = self._leaving.popleft()
            # The storage is freed on the compute stream: whatever reuses it must come after the copy.
            self.wait(done, oldest.device)
            self._leaving_bytes -= oldest.numel()

    def block_ended(self) -> None:
        """What the block before this one has put away must be gone by now."""
        self.let_go(self._in_block)
        self._in_block = 0

    def wait(self, event: torch.cuda.Event, device: torch.device) -> None:
        """Make compute wait for a copy, and note for how long it really waits."""
        compute = torch.cuda.current_stream(device)
        if _passed(event):
            compute.wait_event(event)
            return
        began, ended = _event(timed=True), _event(timed=True)
        began.record(compute)
        compute.wait_event(event)
        ended.record(compute)
        self._stalls.append((began, ended))

    def prefetch_before(self, slot: PinnedSlot) -> None:
        """Start the copies of storages that were put away before this one: backward asks for them next."""
        for number in range(slot.number - 1, min(self._order, default=0) - 1, -1):
            other = self._order[number]() if number in self._order else None
            if other is not None and other.device == slot.device:
                if self.ahead_bytes + other.storage_bytes > self.prefetch_bytes:
                    return
                other.prefetch()

    def retire(self, buffer: Tensor, event: torch.cuda.Event) -> None:
        """Take a buffer back once the event has passed."""
        self._retired.append((buffer, event))

    def new_step(self) -> None:
        """Forget the order of slots that are gone, and add up the stalls that are over."""
        self._order = {number: reference for number, reference in self._order.items() if reference() is not None}
        while self._stalls and _passed(self._stalls[0][1]):
            began, ended = self._stalls.popleft()
            self.stall_seconds += began.elapsed_time(ended) / 1e3
        self._collect()

    def _collect(self) -> None:
        # Slots die in other threads, too: nothing but the ends of these queues is touched.
        for _ in range(len(self._retired)):
            buffer, event = self._retired.popleft()
            if _passed(event):
                self.pool.give(buffer)
            else:
                self._retired.append((buffer, event))
        while self._leaving and _passed(self._leaving[0][0]):
            self._leaving_bytes -= self._leaving.popleft()[1].numel()
