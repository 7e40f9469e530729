"""The arena with several streams and threads: no address is two blocks' at once, whoever else uses it."""

from __future__ import annotations

import ctypes
import random
import threading
import warnings

from memopt.offload import Arena
from tests.offload.arena_programs import random_program, recorded
from tests.offload.host_device import STREAM, HostDevice


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
