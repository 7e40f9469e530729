"""On a GPU: plans with pinned swap, prefetch and replays on streams. Elsewhere the same, fewer of them, walked through
with the stand-in for ``torch.cuda`` of tests/offload/test_pinned.py; what needs a GPU's memory is not collected then.

python -m pytest tests/offload/test_cuda.py
"""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memopt.offload import HostOptimizer, PagedOptimizer, apply
from memopt.offload.pinned import pool
from memopt.offload.pinned import tier as pinned
from memopt.offload.tiers import host, open_tier
from memopt.planner.values import Action
from tests.offload.models import CASES, everything, make_plan, mixture, parted, step_loss, templates
from tests.offload.test_pinned import FakeTorch

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
SIZE = 1 << 19 if GPU else 1 << 10
NAMES = ("gpt", "gpt-autocast", "resnet", "views", "llama-autocast", "t5") if GPU else ("gpt",)

# In a process of its own, because torch changes its allocator only before CUDA is used.
ARENA = """
import torch
from memopt.offload import Arena

def train(step):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(256, 1024), torch.nn.GELU(), torch.nn.Linear(1024, 256)]
    model = torch.nn.Sequential(*layers).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for turn in range(6):
        with step():
            x = torch.full((512, 256), 0.1 * (turn + 1), device="cuda")
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            del x, loss
        held.append((arena.planned_bytes, arena.reserved_bytes, arena.misses))
    return losses

from contextlib import nullcontext
arena, held = Arena(), []
plain = train(nullcontext)
held.clear()
ours = train(arena.step)
torch.cuda.synchronize()
assert plain == ours, (plain, ours)
assert held[-1][0] > 512 * 1024 * 4 and held[-1][2] == 0, held
assert held[-1][1] == held[-2][1], held
before = arena.reserved_bytes
arena.close()
assert before - arena.reserved_bytes >= held[-1][0], (before, arena.reserved_bytes, held)
try:
    torch.empty(1 << 50, device="cuda")
except RuntimeError as error:
    assert "out of memory" in str(error), error
else:
    raise AssertionError("no error")
torch.ones(4, device="cuda").sum().item()
"""

EXACT = (Action.KEEP, Action.SWAP, Action.RECOMPUTE)


def _train(case: Any, model: nn.Module, batches: list[Any]) -> list[Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    torch.manual_seed(123)
    seen: list[Tensor] = []
    for inputs in batches:
        loss = step_loss(case, model, inputs)
        loss.backward()
        seen += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        optimizer.step()
        optimizer.zero_grad()
    torch.cuda.synchronize()
    rng = torch.cuda.get_rng_state() if GPU else torch.get_rng_state()
    return [*seen, *(v.clone() for v in model.state_dict().values()), rng]


def _prepared(name: str) -> tuple[Any, nn.Module, list[Any], list[Tensor], Any]:
    if GPU:
        torch.backends.cudnn.deterministic = True
        torch.use_deterministic_algorithms(True, warn_only=True)
    case = CASES[name]
    generator = torch.Generator().manual_seed(7)
    batches = [tuple(t.to(DEVICE) for t in case.inputs(generator)) for _ in range(3)]
    torch.manual_seed(1)
    model = case.make().to(DEVICE)
    twin = copy.deepcopy(model)
    found = templates(case, copy.deepcopy(model), batches[0])
    return case, model, batches, _train(case, twin, batches), found


@pytest.fixture(autouse=True)
def _played_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if not GPU:
        fake = FakeTorch()
        monkeypatch.setattr(pinned, "torch", fake)
        monkeypatch.setattr(pool, "torch", fake)
        monkeypatch.setattr(host, "open_tier", lambda folder, limit: pinned.PinnedTier(limit))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


@pytest.mark.filterwarnings("ignore:.*deterministic")
@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize("name", NAMES)
def test_mixtures_on_the_gpu(name: str, tier: str) -> None:
    case, model, batches, expected, found = _prepared(name)
    start = copy.deepcopy(model.state_dict())
    for seed in range(6 if GPU else 1):
        model.load_state_dict(start)
        model.zero_grad()
        plan = parted(make_plan(case, mixture(found, seed, EXACT), tier), found, seed)
        with apply(model, plan) as handle:
            ours = _train(case, model, batches)
            assert handle.counts.whole == 0, handle.counts.reasons
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True)), seed


def test_copies_race_with_nothing() -> None:
    """Many storages out and in beside compute that overwrites whatever is freed: every byte comes back."""
    tier: Any = open_tier("host")
    tier.in_flight_bytes = tier.prefetch_bytes = 8 * 2**20
    for turn in range(20 if GPU else 1):
        made = [torch.full((SIZE,), float(turn * 100 + n), device=DEVICE) for n in range(40)]
        slots = [tier.put(tensor) for tensor in made]
        del made
        noise = torch.randn(2 * [2048 if GPU else 16], device=DEVICE)
        for n in reversed(range(40)):
            noise = noise @ noise / 45
            torch.full((SIZE,), -1.0, device=DEVICE)
            back = slots[n].get().view(torch.float32)
            assert bool((back == turn * 100 + n).all()), (turn, n)
        slots.clear()
    torch.cuda.synchronize()
    tier.new_step()
    assert tier.held_bytes == tier.ahead_bytes == tier._leaving_bytes == 0


@pytest.mark.parametrize("kind", [HostOptimizer, PagedOptimizer])
def test_optimizer_states_beside_the_gpu(kind: Any) -> None:
    _, model, batches, _, _ = _prepared("gpt")
    twin = copy.deepcopy(model)
    on_cpu = kind is HostOptimizer  # the step's arithmetic is then the CPU's
    plain = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    ours = kind(model.parameters(), lambda p: torch.optim.AdamW(p, lr=1e-2))
    for module, optimizer in ((twin, plain), (model, ours)):
        torch.manual_seed(4)
        for inputs in batches:
            module(*inputs).backward()
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4 if on_cpu else 0, atol=1e-5 if on_cpu else 0)


if GPU:

    def test_memory_is_what_the_plan_frees() -> None:
        case, model, batches, _, found = _prepared("gpt")
        peaks = {}
        for action in EXACT:
            with apply(model, make_plan(case, everything(found, action))):
                for _ in range(3):
                    gc.collect()
                    torch.cuda.reset_peak_memory_stats()
                    model(*batches[0]).backward()
                    model.zero_grad()
                peaks[action] = torch.cuda.max_memory_allocated()
        assert peaks[Action.SWAP] < peaks[Action.KEEP]
        assert peaks[Action.RECOMPUTE] < peaks[Action.KEEP]

    def test_an_arena_replays_a_training_step() -> None:
        run = subprocess.run([sys.executable, "-c", ARENA], capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr[-3000:]
