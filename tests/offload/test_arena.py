"""The arena over the host's memory: addresses as planned, never one twice at once, and what happens off the plan."""

from __future__ import annotations

import ctypes
import random
import threading
import warnings
from dataclasses import dataclass, field

import pytest

from memopt.offload import Arena
from memopt.offload.static.arena import buffers_of
from memopt.offload.static.native import GRANULE_BYTES
from memopt.planner import Buffer
from memopt.planner.placement import find_fault, max_live
from tests.offload.host_device import STREAM, HostDevice

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


@pytest.mark.parametrize("seed", range(8))
def test_replayed_steps_lie_where_the_plan_says(seed: int) -> None:
    device, program = HostDevice(), random_program(seed)
    arena, runner = recorded(device, program)
    placement = arena.placement
    assert placement is not None
    buffers = lifetimes(program)
    ordered = [buffers[b] for b in sorted(buffers)]
    planned = dict(zip(buffers, placement.offsets, strict=True))
    assert arena.planned_bytes == placement.peak >= max_live(ordered)
    (base,) = (a for a, size in device.held.items() if size == placement.peak)
    for _ in range(3):
        calls = device.calls
        with arena.step():
            addresses = runner.run(program)
        inside = {b: a - base for b, a in addresses.items() if base <= a < base + placement.peak}
        assert inside == planned
        assert find_fault(ordered, [inside[b] for b in sorted(inside)], placement.peak, GRANULE_BYTES) is None
        assert max(inside[b] + buffers[b].size for b in inside) == placement.peak
        assert device.calls - calls <= 3  # only what outlives the step asks the device
        runner.free_all()
    assert arena.misses == 0
    arena.close()


def test_reserved_memory_is_the_plan_when_nothing_outlives_the_step() -> None:
    device, program = HostDevice(), random_program(1, outliving=0)
    arena, runner = recorded(device, program)
    for _ in range(3):
        with arena.step():
            runner.run(program)
        assert arena.reserved_bytes == device.held_bytes == arena.planned_bytes
    arena.close()
    assert arena.reserved_bytes == device.held_bytes == 0


def test_the_log_becomes_buffers_of_what_lives_and_dies_in_the_step() -> None:
    log = [(0, 0, 512), (0, 1, 1024), (0, 2, 512), (1, 1, 1024), (2, 2, 0), (1, 2, 512), (0, 3, 512), (1, 3, 512)]
    sizes, buffers = buffers_of(log)
    assert sizes == [512, 1024, 512, 512]
    assert {n: (b.start, b.stop, b.size) for n, b in buffers.items()} == {1: (1, 3, 1024), 3: (6, 7, 512)}


@pytest.mark.parametrize("seed", range(12))
def test_steps_off_the_plan_follow_the_oracle(seed: int) -> None:
    """Other sizes, allocations added and left out, frees that come late or never: every address is the oracle's."""
    device, program = HostDevice(), random_program(seed)
    arena, runner = recorded(device, program)
    assert arena.placement is not None
    sizes = [-(-size // GRANULE_BYTES) * GRANULE_BYTES for _, size in program if size]
    planned = lifetimes(program)  # in the order of their frees, as the log has them
    oracle = Oracle(sizes, dict(zip(planned, arena.placement.offsets, strict=True)))
    (base,) = (a for a, size in device.held.items() if size == arena.planned_bytes)
    rng = random.Random(seed)
    places: dict[int, int | None] = {}
    late: list[int] = []
    mutated: Program = []
    for block, size in program:
        if size and seed % 3 == 0 and rng.random() < 0.05:
            mutated.append((block, size + 4096))
        elif not size and rng.random() < 0.2:
            late.append(block)
        else:
            mutated.append((block, size))
        if late and rng.random() < 0.1:
            mutated.append((late.pop(), 0))
    if seed % 3 == 1:
        mutated.insert(rng.randrange(len(mutated)), (1000, 512))
    missed = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with arena.step():
            for block, size in mutated:
                if size:
                    places[block] = oracle.allocate(size)
                    address = runner.allocate(block, size)
                    inside = address - base if base <= address < base + arena.planned_bytes else None
                    assert inside == places[block]
                    n = oracle.next - 1
                    missed += inside is None and (n in oracle.offsets or n >= len(sizes))
                    missed += n < len(sizes) and n not in oracle.offsets and sizes[n] != -(-size // 512) * 512
                else:
                    runner.free(block)
                    if places[block] is not None:
                        del oracle.live[places[block]]  # type: ignore[arg-type]
    assert arena.misses == missed
    runner.free_all()
    arena.close()
    assert device.held_bytes == 0


def test_another_shape_warns_once_and_is_planned_anew() -> None:
    device, short, long = HostDevice(), [(0, 1000), (1, 2000), (0, 0), (1, 0)], [(0, 1000), (1, 9000), (0, 0), (1, 0)]
    arena, runner = recorded(device, short)
    with (
        pytest.warns(UserWarning, match=r"step 3 asked for 9216 bytes in allocation 1, where 2048 were planned"),
        arena.step(),
    ):
        runner.run(long)
    assert arena.misses == 1
    assert arena.planned_bytes == 0
    for planned_bytes in (0, 1024 + 9216, 1024 + 9216):  # recorded twice, then replayed
        with arena.step():
            runner.run(long)
        assert arena.planned_bytes == planned_bytes
    assert arena.reserved_bytes == planned_bytes
    with arena.step():  # differs again, and warns no more
        runner.run([*long, (2, 100), (2, 0)])
    assert arena.misses == 2
    arena.close()


@pytest.mark.parametrize("repeats", [1, 2])
def test_shapes_that_never_settle_end_the_planning(repeats: int) -> None:
    """Every step another size, or every second one, so that each plan fails at once."""
    device = HostDevice()
    arena, runner = Arena(memory=device.memory), Runner(device)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for step in range(40):
            with arena.step():
                runner.run([(0, 600 * (step // repeats + 1)), (0, 0)])
    said = [str(w.message) for w in seen]
    assert sum("plans no more" in text for text in said) == 1
    assert sum("records anew" in text for text in said) == repeats - 1
    assert len(said) == repeats
    assert arena.planned_bytes == 0
    arena.close()


def test_an_unlike_first_step_is_not_planned() -> None:
    """As where an optimizer makes its states in the first step."""
    device, program = HostDevice(), random_program(9)
    arena, runner = Arena(memory=device.memory), Runner(device)
    with arena.step():
        runner.run([(900, 7000), *program])
    for step in range(3):
        with arena.step():
            runner.run([(block + 1000 * (step + 1), size) for block, size in program])
        assert (arena.planned_bytes > 0) is (step > 0)
    assert arena.misses == 0
    runner.free_all()
    arena.close()


def test_a_block_that_stays_alive_keeps_its_address_to_itself() -> None:
    device, program = HostDevice(), random_program(4, outliving=0)
    arena, runner = recorded(device, program)
    (region,) = device.held
    with arena.step():
        runner.run(program[: len(program) // 2])
    kept = len(runner.live)
    assert kept > 0
    again = [(block + 500, size) for block, size in program]
    with arena.step():
        runner.run(again)  # the runner checks that nothing overlaps and nothing is overwritten
    assert arena.misses > 0
    assert arena.planned_bytes > 0  # late frees do not end a plan
    arena.close()
    assert region in device.held  # it lives until the last block in it is freed
    runner.free_all()
    assert region not in device.held


def test_other_streams_pass_through_and_shift_nothing() -> None:
    device, program = HostDevice(), random_program(5, outliving=0)
    arena, runner = recorded(device, program)
    with arena.step():
        for at, (block, size) in enumerate(program):
            if at % 7 == 0:
                device.free(device.malloc(333, STREAM + 1), 333, STREAM + 1)
            runner.run([(block, size)])
    assert arena.misses == 0
    arena.close()


def test_a_block_that_another_stream_uses_is_not_planned() -> None:
    device = HostDevice()
    arena = Arena(memory=device.memory)
    for _ in range(3):
        with arena.step():
            first, second = device.malloc(4096), device.malloc(512)
            device.share(first, STREAM + 1)
            device.share(second, STREAM)  # its own stream changes nothing
            device.free(first, 4096)
            device.free(second, 512)
    assert arena.planned_bytes == 512
    assert arena.misses == 0
    arena.close()


def test_an_address_shared_in_a_replay_waits_for_the_device() -> None:
    device, program = HostDevice(), [(0, 512), (0, 0), (1, 512), (1, 0)]
    arena, _ = recorded(device, program)
    assert arena.planned_bytes == 512
    with arena.step():
        first = device.malloc(512)
        device.share(first, STREAM + 1)
        device.free(first, 512)
        second = device.malloc(512)
        assert second != first
        device.free(second, 512)
    assert arena.misses == 1
    waits = device.waits
    with arena.step():
        assert device.waits == waits + 1
        assert device.malloc(512) == first
        device.free(first, 512)
        assert device.malloc(512) == first
        device.free(first, 512)
    device.stream = STREAM + 1
    with arena.step():  # a step on another stream follows all that ran before
        assert device.waits == waits + 2
    arena.close()


def test_threads_share_no_address() -> None:
    device, program = HostDevice(), random_program(6, allocations=400, outliving=0)
    arena, _ = recorded(device, program)
    faults: list[int] = []

    def work(seed: int) -> None:
        rng, live = random.Random(seed), []
        for turn in range(300):
            size = rng.choice([512, 1024, 5120, 70_144])
            address, value = device.malloc(size), (seed * 41 + turn) % 251
            ctypes.memset(address, value, size)
            live.append((address, size, value))
            if len(live) > 5:
                address, size, value = live.pop(rng.randrange(len(live)))
                if ctypes.string_at(address, size) != bytes([value]) * size:
                    faults.append(turn)
                device.free(address, size)
        for address, size, _ in live:
            device.free(address, size)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with arena.step():
            workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
    assert faults == []
    arena.close()
    assert device.held_bytes == 0


def test_an_exception_drops_a_recording_and_keeps_a_plan() -> None:
    device, program = HostDevice(), random_program(7, outliving=0)
    arena, runner = Arena(memory=device.memory), Runner(device)

    def failing() -> None:
        with arena.step():
            runner.run(program[:9])
            raise KeyError("in the middle of a step")

    for planned in (False, True):
        with pytest.raises(KeyError, match="in the middle"):
            failing()
        runner.free_all()
        assert (arena.planned_bytes > 0) is planned
        for _ in range(2):
            with arena.step():
                runner.run(program)
        assert arena.planned_bytes > 0
    assert arena.misses == 0
    arena.close()


def test_a_device_without_room_for_the_arena_is_said_so_and_goes_on() -> None:
    device = HostDevice()
    arena, runner = Arena(memory=device.memory), Runner(device)

    def crowded_step() -> None:
        with arena.step():
            runner.run([(0, 4096), (0, 0)])
            device.limit_bytes = 2048

    with arena.step():
        runner.run([(0, 4096), (0, 0)])
    with pytest.warns(UserWarning, match="no block of 4096 bytes left; it plans no more"):
        crowded_step()
    assert device.cleared > 0
    device.limit_bytes = 8192
    with arena.step():
        runner.run([(0, 4096), (0, 0)])
    assert arena.planned_bytes == arena.misses == 0
    arena.close()


def test_freed_blocks_are_given_back_before_memory_runs_out() -> None:
    device = HostDevice(limit_bytes=8192)
    arena = Arena(memory=device.memory)
    device.free(device.malloc(6144), 6144)
    assert arena.reserved_bytes == 6144
    second = device.malloc(4096)
    assert arena.reserved_bytes == device.held_bytes == 4096
    device.free(second, 4096)
    arena.close()


def test_misuse_is_refused() -> None:
    device = HostDevice()
    with pytest.raises(ValueError, match="device is 'cpu', expected a CUDA device"):
        Arena("cpu")
    with pytest.raises(ValueError, match="time_limit is 0"):
        Arena(memory=device.memory, time_limit=0)
    arena = Arena(memory=device.memory)
    with pytest.raises(ValueError, match="has an Arena already"):
        Arena(memory=device.memory)
    with arena.step():
        with pytest.raises(RuntimeError, match="do not nest"), arena.step():
            pass
        with pytest.raises(RuntimeError, match="close it afterwards"):
            arena.close()
    arena.close()
    arena.close()
    with arena.step():
        pass
    Arena(memory=device.memory).close()


def test_without_a_compiler_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memopt.offload.static.arena.library", lambda: None)
    with pytest.warns(UserWarning, match=r"no C\+\+ compiler to build it with; torch's own allocator goes on"):
        arena = Arena(memory=HostDevice().memory)
    with arena.step():
        pass
    assert arena.planned_bytes == arena.reserved_bytes == arena.misses == 0
