"""What a step that fails, a graph that ends and a plan that is taken back leave behind: nothing."""

from __future__ import annotations

import copy
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from memopt.offload import apply
from memopt.planner.values import Action, BlockPlan, StorageAction
from tests.offload.models import everything, make_plan, mixture, run, same, step_loss
from tests.offload.prepared import EXACT, with_twin


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_exception_in_a_step_leaves_nothing_behind(where: str) -> None:
    case, model, twin, data, found = with_twin("gpt")
    handle = apply(model, make_plan(case, mixture(found, 2, EXACT), "disk"))
    torch.manual_seed(5)

    class Boom(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            raise KeyboardInterrupt

    def trip(module, args, output):
        if where == "forward":
            raise KeyboardInterrupt
        return Boom.apply(output)

    for block in (model.blocks[1], model.blocks[1].attention):
        hook = block.register_forward_hook(trip)
        with pytest.raises(KeyboardInterrupt):
            step_loss(case, model, data[0]).backward()
        hook.remove()
        gc.collect()
        assert handle.tier.held_bytes == 0
    model.zero_grad()
    assert same(run(case, model, data), run(case, twin, data))
    assert handle.tier.held_bytes == 0
    handle.remove()


def test_after_an_exception_calls_are_counted_from_the_first() -> None:
    """A block called three times a step, its first call alone swapped: so it is in the step after one cut short."""
    case, model, _, data, found = with_twin("twice")
    actions = everything(found, Action.SWAP)
    plan = make_plan(case, {key: some for key, some in actions.items() if key[1] == 0})
    moved: list[int] = []
    with apply(model, plan) as handle:
        model.block.register_forward_hook(lambda *args: moved.append(handle.tier.moved_bytes))
        hook = model.block.register_forward_hook(lambda *args: 1 // 0 if len(moved) == 2 else None)
        with pytest.raises(ZeroDivisionError):
            step_loss(case, model, data[0])
        hook.remove()
        moved.clear()
        before = handle.tier.moved_bytes
        step_loss(case, model, data[0]).backward()
        assert before < moved[0] == moved[1] == moved[2]


@pytest.mark.parametrize("retain", [False, True])
def test_an_exception_in_a_replay_leaves_nothing_behind(retain: bool) -> None:
    """The block's code fails when backward runs it again; where the graph is retained, the next backward is whole."""
    case, model, twin, data, found = with_twin("gpt")
    with apply(model, make_plan(case, everything(found, Action.RECOMPUTE))) as handle:
        torch.manual_seed(5)
        loss = step_loss(case, model, data[0])
        hook = model.blocks[1].up.register_forward_hook(lambda *args: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            loss.backward(retain_graph=retain)
        hook.remove()
        model.zero_grad()
        if retain:
            loss.backward()
            torch.manual_seed(5)
            step_loss(case, twin, data[0]).backward()
            assert same([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()])
            model.zero_grad()
            twin.zero_grad()
        del loss
        assert same(run(case, model, data), run(case, twin, data))
        assert handle.counts.whole <= 1, handle.counts.reasons


def test_remove_puts_everything_back() -> None:
    case, model, twin, data, found = with_twin("gpt")
    before = [dict(module.__dict__) for module in model.modules()]
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    handle = apply(model, make_plan(case, mixture(found, 2, EXACT)))
    torch.manual_seed(4)
    loss = step_loss(case, model, data[0])
    handle.remove()
    handle.remove()
    loss.backward()  # a graph made under the plan still works
    torch.manual_seed(4)
    step_loss(case, twin, data[0]).backward()
    assert same([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()])
    assert [module.__dict__.keys() for module in model.modules()] == [members.keys() for members in before]
    assert hooks == [len(module._forward_pre_hooks) for module in model.modules()]
    assert "forward" not in model.blocks[0].__dict__


def test_a_copy_of_the_model_is_not_planned() -> None:
    case, model, _, data, found = with_twin("gpt")
    with apply(model, make_plan(case, everything(found, Action.RECOMPUTE))):
        other = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(0.5)
        torch.manual_seed(0)
        ours = step_loss(case, other, data[0])
    torch.manual_seed(0)
    assert torch.equal(ours, step_loss(case, other, data[0]))


def test_nothing_outlives_the_graph() -> None:
    case, model, _, data, found = with_twin("gpt")
    seen: list[weakref.ref] = []
    model.blocks[1].register_forward_pre_hook(lambda m, args: seen.append(weakref.ref(args[0])))
    gc.disable()
    try:
        for action in EXACT:
            with apply(model, make_plan(case, everything(found, action))):
                for batch in data[:2]:
                    seen.clear()
                    step_loss(case, model, batch).backward()
                    assert [ref() for ref in seen] == [None]
    finally:
        gc.enable()


def test_a_graph_that_never_runs_backward_is_freed() -> None:
    """A saved output leads to the operation that saved it; holding it as it is would be a cycle through C++."""
    case, model, _, data, found = with_twin("gpt")
    seen: list[weakref.ref] = []
    model.blocks[1].attention.register_forward_hook(lambda m, args, out: seen.append(weakref.ref(out)))
    for action in EXACT:
        with apply(model, make_plan(case, mixture(found, 1, (Action.SWAP, action)), "disk")) as handle:
            for batch in data[:2]:
                seen.clear()
                step_loss(case, model, batch)
                gc.collect()
                assert [ref() for ref in seen] == [None]
                assert handle.tier.held_bytes == 0


def test_what_a_block_stores_on_itself_stays_as_forward_left_it() -> None:
    """Backward runs the block's code again, on tensors without data; these must not stay on its modules."""

    class Remembering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.register_buffer("scale", torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            self.inner.last = (self.inner(x) * self.scale).sigmoid()
            self.scale = self.scale * 2
            self.times = getattr(self, "times", 0) + 1
            return self.inner.last.exp()

    model = nn.Sequential(Remembering())
    actions = tuple(StorageAction(n, 0, Action.RECOMPUTE) for n in range(2))
    plan = SimpleNamespace(blocks=(BlockPlan("0", 0, "", actions),), swap_tier="none")
    with apply(model, plan) as handle:
        for n in range(1, 4):
            loss = model(torch.ones(2, 4)).sum()
            last, scale = model[0].inner.last, model[0].scale
            loss.backward()
            assert model[0].inner.last is last
            assert model[0].scale is scale
            assert model[0].times == n
        assert handle.counts.replays == 3
