"""Programs of allocations and frees for the arena over the host's memory, what runs them, and the plainest replay."""

from __future__ import annotations

import ctypes
import random
from dataclasses import dataclass, field

from memopt.offload import Arena
from memopt.offload.static.native import GRANULE_BYTES
from memopt.planner import Buffer
from tests.offload.host_device import HostDevice

Program = list[tuple[int, int]]  # (block, bytes) allocates a block, (block, 0) frees it


def random_program(seed: int, allocations: int = 60, outliving: int = 3) -> Program:
    """Allocations and frees in random order; some blocks are still alive at the end."""
    rng = random.Random(seed)
    program: Program = []
    live: list[int] = []
    for block in range(allocations):
        program.append((block, rng.choice([1, 300, 512, 5000, 70_000]) + rng.randrange(2000)))
        live.append(block)
        while len(live) > outliving + rng.randrange(12):
            program.append((live.pop(rng.randrange(len(live))), 0))
    while len(live) > outliving:
        program.append((live.pop(rng.randrange(len(live))), 0))
    return program


@dataclass
class Runner:
    """Runs programs on a device. Each block is filled, and has to hold the same when it is freed."""

    device: HostDevice
    live: dict[int, tuple[int, int, int]] = field(default_factory=dict)

    def run(self, program: Program) -> dict[int, int]:
        addresses = {}
        for block, size in program:
            if size:
                addresses[block] = self.allocate(block, size)
            else:
                self.free(block)
        return addresses

    def allocate(self, block: int, size: int) -> int:
        address = self.device.malloc(size)
        for other, other_size, _ in self.live.values():
            assert address + size <= other or other + other_size <= address
        ctypes.memset(address, block % 251, size)
        self.live[block] = (address, size, block % 251)
        return address

    def free(self, block: int) -> None:
        address, size, value = self.live.pop(block)
        assert ctypes.string_at(address, size) == bytes([value]) * size
        self.device.free(address, size)

    def free_all(self) -> None:
        for block in list(self.live):
            self.free(block)


@dataclass
class Oracle:
    """Replay in its plainest form: the offset of each allocation, or None where it passes through."""

    sizes: list[int]
    offsets: dict[int, int]
    live: dict[int, int] = field(default_factory=dict)
    next: int = 0

    def allocate(self, size: int) -> int | None:
        n, self.next = self.next, self.next + 1
        size = -(-size // GRANULE_BYTES) * GRANULE_BYTES
        if n >= len(self.sizes) or self.sizes[n] != size or n not in self.offsets:
            return None
        at = self.offsets[n]
        if any(at < other + taken and other < at + size for other, taken in self.live.items()):
            return None
        self.live[at] = size
        return at


def recorded(device: HostDevice, program: Program) -> tuple[Arena, Runner]:
    """An arena with a plan for the program, and a runner without live blocks."""
    arena, runner = Arena(memory=device.memory), Runner(device)
    for _ in range(2):
        assert arena.planned_bytes == 0
        with arena.step():
            runner.run(program)
        runner.free_all()
    return arena, runner


def lifetimes(program: Program) -> dict[int, Buffer]:
    """What should be planned, said again without the log."""
    times = {block: at for at, (block, size) in enumerate(program) if size}
    sizes = {block: -(-size // GRANULE_BYTES) * GRANULE_BYTES for block, size in program if size}
    return {b: Buffer(times[b], at, sizes[b]) for at, (b, size) in enumerate(program) if not size}
