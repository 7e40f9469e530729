"""The pinned tier, its streams and events played on the CPU: what it does when copies are late, and what it holds.

A stand-in for ``torch.cuda`` keeps the order of waits and records; copies happen at once, and an event has passed only
after it has been asked for a few times, as if the copies were slow. The real thing is tests/offload/test_cuda.py.
"""

from __future__ import annotations

import gc
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from memopt.offload import PagedOptimizer, SwapError, apply
from memopt.offload.pinned import pool
from memopt.offload.pinned import tier as pinned
from memopt.offload.recording import Recorder
from memopt.offload.tiers import host
from memopt.planner.values import Action
from tests.offload.models import everything, make_plan, mixture, parted, run, same
from tests.offload.optimizer_cases import refusing
from tests.offload.prepared import EXACT, prepared


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.asked, self.recorded = 0, False
        self.after: set[Event] = set()

    def record(self, stream: Stream) -> None:
        self.recorded = True
        self.after = set(stream.after)
        stream.after.add(self)

    def query(self) -> bool:
        assert self.recorded
        self.asked += 1
        return self.asked > 3

    def synchronize(self) -> None:
        assert self.recorded
        self.asked = 4

    def elapsed_time(self, other: Event) -> float:
        return 0.5


class Stream:
    """``after``: the events that whatever is put on it next comes after."""

    def __init__(self) -> None:
        self.after: set[Event] = set()

    def wait_stream(self, other: Stream) -> None:
        assert other is not self
        self.after |= other.after

    def wait_event(self, event: Event) -> None:
        assert event.recorded
        self.after |= {event} | event.after


class FakeTorch:
    """torch, with pinned memory that is none and a ``cuda`` of two classes."""

    def __init__(self) -> None:
        compute = self.compute = Stream()
        self.cuda = SimpleNamespace(
            Event=Event,
            Stream=Stream,
            current_stream=lambda device: compute,
            stream=lambda stream: nullcontext(),
            device=lambda device: nullcontext(),
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        assert not pin_memory or args[0].bit_count() == 1  # torch would pin the next power of two
        return torch.empty(*args, **kwargs)


@pytest.fixture(autouse=True)
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeTorch:
    fake = FakeTorch()
    monkeypatch.setattr(pinned, "torch", fake)
    monkeypatch.setattr(pool, "torch", fake)
    return fake


@pytest.mark.parametrize("room", [1 << 30, 20_000, 1])
def test_training_with_late_copies(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        host, "open_tier", lambda folder, limit: pinned.PinnedTier(limit, in_flight_bytes=room, prefetch_bytes=room)
    )
    case, model, start, batches, expected, found = prepared("gpt")
    for seed in range(2):
        model.load_state_dict(start)
        plan = parted(make_plan(case, mixture(found, seed, EXACT)), found, seed)
        with apply(model, plan) as handle:
            assert same(run(case, model, batches), expected)
            tier: Any = handle.tier
            pinned_bytes = tier.pool.pinned_bytes
            run(case, model, batches * 2)
            gc.collect()
            for _ in range(10_000):  # each event has to be asked some times
                if tier._leaving or tier._retired or tier._stalls:
                    tier.new_step()
            assert tier.held_bytes == tier.ahead_bytes == 0
            assert tier._leaving_bytes == 0
            assert not tier._order
            assert not tier._retired
            assert not tier._stalls
            assert tier.stall_seconds > 0
            assert handle.report.stall_seconds + handle.step_report().stall_seconds == tier.stall_seconds
            assert pinned_bytes > 0
            assert tier.pool.pinned_bytes <= 2 * pinned_bytes
            assert sum(b.numel() for some in tier.pool._free.values() for b in some) == tier.pool.pinned_bytes


def test_copies_come_after_what_they_need_and_before_what_reuses_it(cuda: FakeTorch) -> None:
    def computed() -> Event:
        event = Event()
        event.record(cuda.compute)
        return event

    compute, tier = cuda.compute, pinned.PinnedTier(None)
    retired: dict[int, Event] = {}
    retire, give = tier.retire, tier.pool.give
    tier.retire = lambda buffer, event: (retired.update({id(buffer): event}), retire(buffer, event))[1]
    tier.pool.give = lambda buffer: (give(buffer), waited.append(retired[id(buffer)].asked > 3))[0]
    waited: list[bool] = []
    written = computed()
    slot, other = tier.put(torch.ones(1000)), tier.put(torch.ones(1000))
    assert written in slot.left.after  # out: after the values were computed
    soon = tier.put(torch.ones(1000))
    soon.prefetch()
    assert soon.left in soon._arrived.after  # back: after the way out
    tier.let_go(0)
    assert {slot.left, other.left} <= compute.after  # out: before the memory is used again
    freed = computed()
    slot.prefetch()
    assert freed in slot._arrived.after  # and after the memory that it goes to was free
    slot.get()
    assert slot._arrived in compute.after
    other.prefetch()
    arrived = other._arrived
    del slot, other
    assert arrived in compute.after  # fetched and not wanted: its memory may be used again only now
    for _ in range(5):
        tier.new_step()
    assert waited == [True, True]  # the buffers are handed out again when the copies are done with them


def test_bytes_in_flight_are_limited() -> None:
    tier = pinned.PinnedTier(None, in_flight_bytes=8_000)
    slots = []
    for _ in range(5):
        slots.append(tier.put(torch.zeros(1000)))
        assert tier._leaving_bytes <= 8_000
    assert tier._leaving_bytes == 8_000


def test_pinned_memory_exhausted_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    tier = pinned.PinnedTier(20 * 2**16)
    monkeypatch.setattr(host, "open_tier", lambda folder, limit: tier)
    case, model, start, batches, expected, found = prepared("gpt")
    with apply(model, make_plan(case, everything(found, Action.SWAP))):
        with pytest.raises(SwapError, match=r"swap tier host: \d+ bytes are pinned .* raise swap_limit_bytes"):
            run(case, model, batches)
        gc.collect()
        assert tier.held_bytes == tier.ahead_bytes == 0
        tier.pool.limit_bytes = None
        model.load_state_dict(start)
        model.zero_grad()
        assert same(run(case, model, batches), expected)


def test_prefetch_goes_backwards_and_stops_at_its_limit() -> None:
    tier = pinned.PinnedTier(None, prefetch_bytes=8_000)
    tensors = [torch.randn(1000) for _ in range(6)]
    slots = [tier.put(tensor) for tensor in tensors]
    assert torch.equal(slots[5].get().view(torch.float32), tensors[5])
    assert [slot._back is not None for slot in slots] == [False, False, False, True, True, False]
    assert tier.ahead_bytes == 8_000
    del slots[4]  # fetched ahead and not wanted after all
    assert tier.ahead_bytes == 4_000
    assert torch.equal(slots[3].get().view(torch.float32), tensors[3])
    assert [slot._back is not None for slot in slots[:3]] == [False, True, True]
    slots.clear()
    assert tier.ahead_bytes == tier.held_bytes == 0


def test_storages_are_let_go_at_the_end_of_the_next_block() -> None:
    """However far the host runs ahead: what is held does not hang on when copies happen to finish."""
    tier = pinned.PinnedTier(None)
    slots = []
    held = []
    for _ in range(3):
        slots += [tier.put(torch.zeros(1000)) for _ in range(2)]
        tier.block_ended()
        held.append(tier._leaving_bytes)
    assert held == [8_000, 8_000, 8_000]
    tier.block_ended()
    assert tier._leaving_bytes == 0
    slots.append(tier.put(torch.zeros(1000)))
    slots[0].get()  # backward has begun
    assert tier._leaving_bytes == 0


def test_at_the_limit_buffers_under_way_are_waited_for() -> None:
    tier = pinned.PinnedTier(3 * 2**16)
    slots = [tier.put(torch.full((1000,), float(n))) for n in range(3)]
    with pytest.raises(SwapError, match="swap tier host: 196608 bytes are pinned"):
        tier.put(torch.zeros(1000))
    del slots[1]
    slots.append(tier.put(torch.full((1000,), 3.0)))
    assert [float(slot.get().view(torch.float32)[-1]) for slot in slots] == [0.0, 2.0, 3.0]
    assert tier.pool.pinned_bytes == 3 * 2**16


def test_a_storage_in_several_buffers_comes_back() -> None:
    tier = pinned.PinnedTier(None)
    x = torch.randn(300_001)
    for moved in (None, 512 * 1300):
        slot = tier.put(x, moved)
        assert len(slot._buffers) > 1
        count = slot.moved_bytes // 4
        assert torch.equal(slot.get().view(torch.float32)[:count], x[:count])


def test_pages_of_optimizer_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two buckets at most are on the device; none after a step, however it ends; nothing grows from step to step."""
    tier = pinned.PinnedTier(None)
    monkeypatch.setattr(host, "open_tier", lambda folder, limit: tier)
    parameters = [torch.nn.Parameter(torch.ones(1000)) for _ in range(4)]
    twins = [torch.nn.Parameter(torch.ones(1000)) for _ in range(4)]
    paged, plain = PagedOptimizer(parameters, refusing, bucket_bytes=4000), refusing(twins)
    bucket, seen = 8000, []
    for optimizer in paged._optimizers:
        optimizer.register_step_pre_hook(lambda *args: seen.append(tier.ahead_bytes + tier._leaving_bytes))
    for n in range(6):
        for parameter in (*parameters, *twins):
            parameter.grad = torch.full_like(parameter, n + 1.0)
        if n == 3:
            paged._optimizers[1].refuses = True
            with pytest.raises(ArithmeticError):
                paged.step()
            assert tier.ahead_bytes == tier._leaving_bytes == 0
            assert all(slot._back is None for slot in paged._slots(*paged._optimizers))
            paged._optimizers[1].refuses = False
        paged.step()
        plain.step()
        assert same(parameters, twins)
        assert max(seen) <= bucket  # beside the one that is stepped
        assert tier.ahead_bytes == tier._leaving_bytes == 0
        assert len(tier._order) <= 2 * 8
    paged.load_state_dict(paged.state_dict())
    assert tier.ahead_bytes == tier._leaving_bytes == 0


@pytest.mark.parametrize("name", ["flash", "cudnn"])
def test_the_gpus_attentions_can_be_replayed_late(name: str) -> None:
    """They return numbers that depend on shapes only."""
    q = torch.empty(2, 4, 16, 8, dtype=torch.bfloat16, device="meta")
    with Recorder([], False) as recorder:
        if name == "flash":
            torch.ops.aten._scaled_dot_product_flash_attention(q, q, q, 0.0, True)
        else:
            torch.ops.aten._scaled_dot_product_cudnn_attention(q, q, q, None, True)
    assert [op.forced for op in recorder.template.ops] == [False]
    assert any(isinstance(o.constant, int) for o in recorder.template.ops[0].outputs)
