"""The arena over the host's memory: addresses as planned, never one twice at once, and what happens off the plan."""

from __future__ import annotations

import random
import warnings

import pytest

from memopt.offload import Arena
from memopt.offload.static.arena import buffers_of
from memopt.offload.static.native import GRANULE_BYTES
from memopt.planner.placement import find_fault, max_live
from tests.offload.arena_programs import Oracle, Program, Runner, lifetimes, random_program, recorded
from tests.offload.host_device import HostDevice


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
