"""The arena where something goes wrong: a step that fails, no room on the device, misuse, no compiler."""

from __future__ import annotations

import pytest

from memopt.offload import Arena
from tests.offload.arena_programs import Runner, random_program
from tests.offload.host_device import HostDevice


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
