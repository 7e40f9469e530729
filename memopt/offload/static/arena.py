"""Static memory on CUDA: a training step's allocations at planned offsets in one block of device memory.

Steps are recorded until two in a row allocate the same (the first one seldom does, since optimizers make their states
in it). The allocations of the second become buffers with lifetimes, ``memopt.planner.place`` finds their offsets, and
in later steps the n-th allocation gets the n-th offset. So a step needs ``Arena.planned_bytes``, once, and nothing is
lost to fragmentation.

Why torch's whole allocator is replaced
    A ``torch.cuda.MemPool`` with a pluggable allocator asks it for segments (2 MiB, 20 MiB or more), which torch's
    caching allocator cuts up itself and does not hand back before the pool ends: no tensor has an offset that a plan
    could choose. Only ``torch.cuda.memory.change_current_allocator`` hands every tensor's allocation and free over,
    and it works only before CUDA is used. Hence an Arena is made first, and what torch reports about its own allocator
    (``torch.cuda.memory_stats``, ``max_memory_allocated``, ``cudnn.benchmark``'s workspace search, the allocator's
    state in CUDA graphs) is not available beside it; ``Arena.reserved_bytes`` is.

What lies in the arena
    Allocations on the step's stream that are made and freed within the step: activations, gradients where
    ``zero_grad`` is inside, workspaces. What outlives the step (parameters, states, a loss that is kept) passes
    through to the device, as does everything between steps; freed blocks of that kind are kept for the next request
    of their size and stream.

Rule of streams
    An address is used again as soon as the host has freed it, which is safe where the next user's kernels run after
    the last user's: on the same stream. So only allocations made on the stream that is current when the step begins
    are planned; those on other streams pass through. A block that ``Tensor.record_stream`` names is not planned; if
    that first happens in a replayed step, its address is not used again before the device has been waited for. Memory
    that another stream uses without ``record_stream`` is as unsafe here as with torch's own allocator.

Where a step differs from the recorded one
    No address is ever given twice at once: an offset is used only where nothing alive meets it. Another size, or more
    allocations, and what has no planned place passes through, counted in ``Arena.misses``; recording starts anew.
    Blocks that are freed later than they were (the planned place is still taken) pass through, too, and the plan
    stays.

This has been tested with the host's memory in place of a GPU's, and has not run on a GPU yet.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from memopt.offload.static.native import (
    ALLOCATED,
    FREED,
    GRANULE_BYTES,
    OFF,
    RECORD,
    REPLAY,
    SHARED,
    UNPLANNED,
    Counters,
    DeviceMemory,
    NativeArena,
    cuda_memory,
    library,
)
from memopt.planner.placement import Buffer, Placement, place

_PATIENCE = 8  # recorded steps unlike the last one, and plans that failed at once, without a good step between
_OPEN: set[int] = set()
_LOCK = threading.Lock()


def buffers_of(log: Sequence[tuple[int, int, int]]) -> tuple[list[int], dict[int, Buffer]]:
    """The bytes of every allocation of a recorded step, and the lifetimes of those that can be planned.

    Args:
        log: kind, number of the allocation and bytes of each event, in order; time is the position in it.

    Returns:
        Sizes by number, and buffers by number: of blocks that were freed in the step and that no other stream used.
    """
    sizes: list[int] = []
    started: dict[int, int] = {}
    buffers: dict[int, Buffer] = {}
    for time, (kind, number, size) in enumerate(log):
        if kind == ALLOCATED:
            sizes.append(size)
            started[number] = time
        elif kind == SHARED:
            started.pop(number, None)
        elif kind == FREED and number in started:
            buffers[number] = Buffer(started.pop(number), time, size, f"allocation {number}")
    return sizes, buffers


class Arena:
    """Places a training step's allocations at planned offsets, so that reserved memory equals the plan.

    Make it before the first CUDA tensor; then ``with arena.step(): ...`` around each whole training step, ``zero_grad``
    included. Steps are recorded until two in a row are alike, later ones are replayed. The module's docstring says
    what is covered.

    Args:
        device: a CUDA device; by default the current one.
        time_limit: seconds for finding offsets after a recorded step.
        memory: where device memory comes from; by default CUDA's own, with torch's allocator replaced.

    Raises:
        ValueError: not a CUDA device, or it has an arena already.
        RuntimeError: CUDA has been used already, so that torch no longer changes its allocator.

    Cost: a recorded step calls the device's allocator, which is slow, and uses freed blocks again for equal sizes only,
    so it reserves more than a planned one; a replayed allocation is a look-up in a tree of live blocks. In bytes,
    ``planned_bytes`` and what outlives the step, both rounded up to 512 per allocation.
    """

    def __init__(
        self,
        device: torch.device | str | int = "cuda",
        *,
        time_limit: float = 5.0,
        memory: DeviceMemory | None = None,
    ) -> None:
        if not time_limit > 0:
            raise ValueError(f"time_limit is {time_limit}, expected more than 0 seconds")
        self._time_limit = time_limit
        self._native: NativeArena | None = None
        self.placement: Placement | None = None
        self.steps = self.misses = 0
        self._failures = 0
        self._last_sizes: list[int] | None = None
        self._fresh = self._warned = self._inside = self._given_up = False
        self._stream: int | None = None
        target = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        if memory is None and (target.type != "cuda" or not torch.cuda.is_available()):
            raise ValueError(f"device is {str(target)!r}, expected a CUDA device that torch can use here")
        functions = library()
        if functions is None:
            self._say("there is no C++ compiler to build it with; torch's own allocator goes on")
            return
        self._memory = memory or cuda_memory(functions, target.index)
        with _LOCK:
            if self._memory.index in _OPEN:
                raise ValueError(f"device {self._memory.index} has an Arena already; close() that one first")
            _OPEN.add(self._memory.index)
        self._native = NativeArena(functions, self._memory)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around one whole training step: records it, or gives it the planned addresses.

        After an exception inside, what a recording saw is dropped, and a plan stays.

        Raises:
            RuntimeError: inside another step of this arena.

        Warns:
            UserWarning: once, when a step's allocations differ from the planned ones; once more when that goes on and
                the arena gives up.
        """
        if self._inside:
            raise RuntimeError("a step of this Arena is under way already; steps do not nest")
        native = self._native
        if native is None:
            yield
            return
        self._inside = True
        replaying = self.placement is not None
        try:
            self._begin(native, REPLAY if replaying else OFF if self._given_up else RECORD)
            try:
                yield
            finally:
                native.end()
                self.steps += 1
                if replaying:
                    self._judge(native, native.counters())
            if not replaying and not self._given_up:
                self._plan(native)
        finally:
            self._inside = False

    @property
    def planned_bytes(self) -> int:
        """The size of the block that the planned allocations of a step lie in; 0 while there is no plan."""
        return self.placement.peak if self.placement else 0

    @property
    def reserved_bytes(self) -> int:
        """All that has been taken from the device: the arena, what passed through, and freed blocks kept for later."""
        if self._native is None:
            return 0
        now = self._native.counters()
        return now.region_bytes + now.retired_bytes + now.passed_bytes + now.cached_bytes

    def close(self) -> None:
        """Gives the plan up; the arena's memory goes back when the last tensor in it is freed.

        Tensors of CUDA go on being allocated by it, without a plan: torch changes its allocator only once.
        """
        if self._inside:
            raise RuntimeError("a step of this Arena is under way; close it afterwards")
        native, self._native = self._native, None
        if native is not None:
            self._memory.synchronize()
            native.settle()
            native.retire()
            self.placement = None
            _OPEN.discard(native.index)

    def _begin(self, native: NativeArena, mode: int) -> None:
        stream = self._memory.stream()
        if stream != self._stream or native.counters().lingering:
            self._memory.synchronize()  # addresses pass from one stream to another
            native.settle()
        self._stream = stream
        native.begin(mode, stream)

    def _judge(self, native: NativeArena, counted: Counters) -> None:
        self.misses += counted.changed + counted.late
        fresh, self._fresh = self._fresh, False
        if not counted.changed:
            self._failures = 0
            return
        self._failures += fresh
        self.placement = self._last_sizes = None
        native.retire()
        if not self._warned:
            self._warned = True
            expected = f"{counted.planned_bytes} were planned" if counted.planned_bytes else "the plan has ended"
            self._say(
                f"step {self.steps} asked for {counted.changed_bytes} bytes in allocation {counted.changed_at}, where "
                f"{expected}; {counted.changed} allocations lay outside the arena, and it records anew"
            )
        self._lose_patience()

    def _plan(self, native: NativeArena) -> None:
        sizes, buffers = buffers_of(native.log())
        last, self._last_sizes = self._last_sizes, sizes
        if last != sizes:
            self._failures += last is not None
            self._lose_patience()
            return
        if not buffers:
            return
        placement = place(list(buffers.values()), alignment=GRANULE_BYTES, time_limit=self._time_limit)
        offsets = [UNPLANNED] * len(sizes)
        for number, offset in zip(buffers, placement.offsets, strict=True):
            offsets[number] = offset
        if native.adopt(sizes, offsets, placement.peak) is None:
            self._given_up = True
            self._say(f"the device has no block of {placement.peak} bytes left; it plans no more")
            return
        self.placement, self._fresh = placement, True

    def _lose_patience(self) -> None:
        if self._failures >= _PATIENCE:
            self._given_up = True
            self._say(f"shapes changed in {_PATIENCE} of the last steps; it plans no more")

    @staticmethod
    def _say(text: str) -> None:
        warnings.warn(f"memopt.offload.Arena: {text}", UserWarning, stacklevel=5)
