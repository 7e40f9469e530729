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

from memopt.offload import apply, pinned
from memopt.offload.tiers import host
from tests.offload.models import make_plan, mixture, parted, run, same
from tests.offload.test_mixtures import EXACT, _prepared


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.asked, self.recorded = 0, False

    def record(self, stream: Any) -> None:
        self.recorded = True

    def query(self) -> bool:
        assert self.recorded
        self.asked += 1
        return self.asked > 3

    def elapsed_time(self, other: Event) -> float:
        return 0.5


class Stream:
    def wait_stream(self, other: Any) -> None:
        assert other is not self

    def wait_event(self, event: Event) -> None:
        assert event.recorded


class FakeTorch:
    """torch, with pinned memory that is none and a ``cuda`` of two classes."""

    def __init__(self) -> None:
        compute = Stream()
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
        return torch.empty(*args, **kwargs)


@pytest.mark.parametrize("room", [1 << 30, 20_000, 1])
def test_training_with_late_copies(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned, "torch", FakeTorch())
    monkeypatch.setattr(
        host, "open_tier", lambda folder, limit: pinned.PinnedTier(limit, in_flight_bytes=room, prefetch_bytes=room)
    )
    case, model, start, batches, expected, found = _prepared("gpt")
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
            assert pinned_bytes > 0
            assert tier.pool.pinned_bytes <= 2 * pinned_bytes
            assert sum(b.numel() for some in tier.pool._free.values() for b in some) == tier.pool.pinned_bytes


def test_prefetch_goes_backwards_and_stops_at_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned, "torch", FakeTorch())
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
