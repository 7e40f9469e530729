"""Shares of storages, and the inputs of blocks: what is held when, and what is refused."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memopt
from memopt.offload import PlanMismatchError, UnsupportedBlockError, apply
from memopt.offload.tiers import open_tier
from memopt.offload.tiers.disk import DiskSlot
from memopt.planner.values import Action, BlockPlan, StorageAction
from tests.offload.models import CASES, make_plan, parted, same, step_loss, templates
from tests.offload.prepared import prepared

WIDTH, ROWS = 64, 256
BYTES = WIDTH * ROWS * 4


class Bend(nn.Module):
    """Saves its input and one storage of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sin().exp()


class Bends(nn.Module):
    """What the blocks take is made between them, and nobody else wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.blocks = nn.ModuleList(Bend() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x + self.scale) * 0.5
        return x.sum()


def _plan(actions: tuple[StorageAction, ...], inputs: tuple[StorageAction, ...] = ()) -> Any:
    return SimpleNamespace(
        blocks=tuple(BlockPlan(f"blocks.{n}", 0, "", actions, inputs) for n in range(3)), swap_tier="disk"
    )


def _gradient(model: nn.Module, x: Tensor, between: Callable[[], None] = lambda: None) -> Tensor:
    loss = model(x)
    between()
    loss.backward()
    found = next(model.parameters()).grad
    model.zero_grad()
    return found


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_the_first_bytes_of_a_storage_go(tier: str, tmp_path) -> None:
    x = torch.randn(1000)
    slot = open_tier(tier, tmp_path).put(x[3:], 512)
    flat = slot.get()
    assert flat.nbytes == 4000
    assert torch.equal(flat[:512].view(torch.float32), x[:128])


@pytest.mark.parametrize(("share", "moved"), [(0.25, BYTES // 4), (0.3, BYTES * 3 // 10 // 512 * 512), (1e-6, 0)])
@pytest.mark.parametrize("field", ["actions", "inputs"])
def test_a_share_goes_and_the_rest_stays(share: float, moved: int, field: str) -> None:
    model, x = Bends(), torch.randn(ROWS, WIDTH)
    expected = _gradient(model, x)
    parts = (StorageAction(0, BYTES, Action.SWAP, share), StorageAction(0, BYTES, Action.KEEP, 1 - share))
    with apply(model, _plan(**{"actions": (), field: parts})) as handle:
        for _ in range(2):
            assert torch.equal(_gradient(model, x), expected)
        assert handle.tier.moved_bytes == 3 * 2 * moved
        gc.collect()
        assert handle.tier.held_bytes == 0


def test_inputs_are_gone_between_forward_and_backward() -> None:
    """Everything recomputed and the inputs swapped: all of three blocks' inputs are away at the end of forward."""
    model, x = Bends(), torch.randn(ROWS, WIDTH)
    expected = _gradient(model, x)
    drop, swap = (StorageAction(0, BYTES, Action.RECOMPUTE),), (StorageAction(0, BYTES, Action.SWAP),)
    away: dict[str, int] = {}
    peak: dict[str, int] = {}
    for name, plan in (("kept", _plan(drop)), ("swapped", _plan(drop, swap))):
        with apply(model, plan) as handle:
            _gradient(model, x)

            def between(name: str = name, tier: Any = handle.tier) -> None:
                away[name] = tier.held_bytes

            with memopt.meter(model) as meter:
                assert torch.equal(_gradient(model, x, between), expected)
            peak[name] = meter.peak_bytes
    assert away == {"kept": 0, "swapped": 3 * BYTES}
    assert peak["kept"] - peak["swapped"] > 1.9 * BYTES


@pytest.mark.parametrize("name", ["resnet", "views"])
def test_shares_and_inputs_survive_a_retained_graph(name: str) -> None:
    """Twice over one graph; ResNet's blocks overwrite in place what they were given."""
    case, model, start, batches, _, found = prepared(name, 1)

    def steps() -> list[Tensor]:
        model.load_state_dict(start)
        model.zero_grad()
        torch.manual_seed(9)
        loss = step_loss(case, model, batches[0])
        loss.backward(retain_graph=True)
        loss.backward()
        return [p.grad for p in model.parameters()]

    expected = steps()
    swaps = {
        key: tuple(
            StorageAction(n, t.sizes[s], (Action.SWAP, Action.RECOMPUTE)[n % 3 == 0]) for n, s in enumerate(t.saved)
        )
        for key, t in found.items()
    }
    for seed in range(4):
        with apply(model, parted(make_plan(case, swaps), found, seed)):
            assert same(steps(), expected), seed


SWAP, KEEP = Action.SWAP, Action.KEEP


@pytest.mark.parametrize(
    ("actions", "inputs", "error", "says"),
    [
        ([(SWAP, 0.25)], [], PlanMismatchError, r"saved storage 0 \(swap 0.25\) do not add up to 1"),
        ([(SWAP, 0.5), (KEEP, 0.6)], [], PlanMismatchError, "do not add up to 1"),
        ([(SWAP, 1.0), (KEEP, 1.0)], [], PlanMismatchError, "two actions for saved storage 0"),
        ([(SWAP, 0.5), (SWAP, 0.5)], [], PlanMismatchError, "two actions for saved storage 0"),
        (
            [(SWAP, 0.5), (Action.RECOMPUTE, 0.5)],
            [],
            UnsupportedBlockError,
            r"would recompute a fraction of 0.5 of saved storage 0; .*tiles \(memopt.offload.tile\)",
        ),
        ([(KEEP, 0.5), (Action.COMPRESS, 0.5)], [], UnsupportedBlockError, "would compress a fraction"),
        ([], [(Action.RECOMPUTE, 1.0)], UnsupportedBlockError, "'recompute' for saved input 0; inputs can be kept or"),
    ],
)
def test_what_cannot_be_split_is_refused_by_name(actions: Any, inputs: Any, error: Any, says: str) -> None:
    model = Bends()
    plan = _plan(*(tuple(StorageAction(0, 0, action, share) for action, share in some) for some in (actions, inputs)))
    with pytest.raises(error, match=rf"block 'blocks.0': .*{says}"):
        apply(model, plan)
    assert "forward" not in model.blocks[0].__dict__


def test_an_input_brought_back_for_a_replay_goes_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the graph is retained, and another backward will bring it back again."""
    model, x = Bends(), torch.randn(ROWS, WIDTH)
    plan = _plan((StorageAction(0, BYTES, Action.RECOMPUTE),), (StorageAction(0, BYTES, Action.SWAP),))
    brought: list[weakref.ref[Tensor]] = []
    get = DiskSlot.get

    def noted(slot: DiskSlot) -> Tensor:
        flat = get(slot)
        brought.append(weakref.ref(flat))
        return flat

    monkeypatch.setattr(DiskSlot, "get", noted)
    with apply(model, plan):
        for _ in range(2):
            loss = model(x)
            loss.backward(retain_graph=True)
            assert brought
            assert all(one() is None for one in brought)
            loss.backward()


def test_inputs_that_the_call_does_not_save() -> None:
    model, x = Bends(), torch.randn(ROWS, WIDTH)
    handle = apply(model, _plan((), (StorageAction(1, BYTES, Action.SWAP),)))
    with pytest.raises(PlanMismatchError, match="an action for saved input 1, but this call saves only 1"):
        model(x)
    handle.remove()
    apply(model, _plan((), (StorageAction(0, BYTES + 512, Action.SWAP),)))
    with pytest.raises(PlanMismatchError, match=f"saved input 0 has {BYTES} bytes, the plan was made for"):
        model(x)


def test_a_swapped_input_that_is_overwritten_is_noticed() -> None:
    case = CASES["gpt"]
    model = case.make()
    inputs = case.inputs(torch.Generator().manual_seed(1))
    found = templates(case, model, inputs)
    plan = make_plan(case, {})
    given = tuple(StorageAction(n, 0, Action.SWAP) for n in range(len(found["blocks.1", 0].saved_inputs)))
    object.__setattr__(plan.blocks[1], "inputs", given)

    seen: list[Tensor] = []
    model.blocks[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    model.blocks[1].up.register_forward_pre_hook(lambda module, args: seen[0].add_(1) * 0 if seen else None)
    with apply(model, plan), pytest.raises(RuntimeError, match=r"'blocks.1' saved is at version|inplace operation"):
        step_loss(case, model, inputs).backward()
