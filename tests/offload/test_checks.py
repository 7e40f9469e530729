"""A plan is checked against the model; what does not fit is named, and leaves the model as it was."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from memopt.offload import PlanMismatchError, UnsupportedBlockError, apply
from memopt.planner.values import Action, BlockPlan, StorageAction
from tests.offload.models import CASES, everything, make_plan, same, step_loss, templates


def _gpt():
    case = CASES["gpt"]
    model = case.make()
    inputs = case.inputs(torch.Generator().manual_seed(1))
    return case, model, inputs, templates(case, model, inputs)


def _usable(case, model, inputs) -> None:
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert not model._forward_pre_hooks
    step_loss(case, model, inputs).backward()


def _plan(*blocks: BlockPlan, tier: str = "host"):
    return SimpleNamespace(blocks=blocks, swap_tier=tier)


def test_a_block_that_is_not_there() -> None:
    case, model, inputs, _ = _gpt()
    with pytest.raises(PlanMismatchError, match=r"'blocks.7', which GPT lacks"):
        apply(model, _plan(BlockPlan("blocks.0", 0, "", ()), BlockPlan("blocks.7", 0, "", ())))
    _usable(case, model, inputs)


def test_another_signature() -> None:
    case, model, inputs, found = _gpt()
    plan = _plan(BlockPlan("blocks.1", 0, "0123456789abcdef", found["blocks.1", 0] and ()))
    handle = apply(model, plan)
    with pytest.raises(PlanMismatchError, match=r"'blocks.1' \(call 0\): its operations .*0123456789abcdef"):
        step_loss(case, model, inputs)
    _usable(case, model, inputs)
    handle.remove()


@pytest.mark.parametrize(
    ("index", "size", "says"), [(0, 12345, "has .* bytes, the plan was made for 12345"), (99, 0, "saves only")]
)
def test_other_bytes(index: int, size: int, says: str) -> None:
    case, model, inputs, _ = _gpt()
    handle = apply(model, _plan(BlockPlan("blocks.1", 0, "", (StorageAction(index, size, Action.SWAP),)), tier="disk"))
    with pytest.raises(PlanMismatchError, match=rf"'blocks.1' \(call 0\).*{says}"):
        step_loss(case, model, inputs)
    gc.collect()
    assert handle.tier.held_bytes == 0
    _usable(case, model, inputs)


def test_no_plan_at_all() -> None:
    with pytest.raises(TypeError, match="plan is a dict without blocks and swap_tier"):
        apply(nn.Linear(1, 1), {})


@pytest.mark.parametrize(
    ("block", "says"),
    [
        (BlockPlan("blocks.0", 0, "", (StorageAction(-1, 0, Action.KEEP),)), "saved storage -1"),
        (
            BlockPlan("blocks.0", 0, "", (StorageAction(1, 0, Action.KEEP), StorageAction(1, 0, Action.SWAP))),
            "two actions",
        ),
    ],
)
def test_nonsense_actions(block: BlockPlan, says: str) -> None:
    case, model, inputs, _ = _gpt()
    with pytest.raises(PlanMismatchError, match=says):
        apply(model, _plan(block))
    _usable(case, model, inputs)


def test_two_plans_for_one_block() -> None:
    case, model, _, found = _gpt()
    plan = make_plan(case, everything(found, Action.KEEP))
    with apply(model, plan), pytest.raises(PlanMismatchError, match=r"'blocks.0' already runs under a plan"):
        apply(model, plan)
    with apply(model, plan):
        pass
    with pytest.raises(PlanMismatchError, match=r"two entries for block 'blocks.0', call 0"):
        apply(model, _plan(*[BlockPlan("blocks.0", 0, "", ())] * 2))


def test_an_unknown_tier_and_a_folder_that_is_not_there(tmp_path) -> None:
    _, model, _, _ = _gpt()
    with pytest.raises(ValueError, match="swap tier 'tape' is unknown; choose one of disk, host, none"):
        apply(model, _plan(BlockPlan("blocks.0", 0, "", ()), tier="tape"))
    with pytest.raises(ValueError, match="cannot be used"):
        apply(model, _plan(BlockPlan("blocks.0", 0, "", ()), tier="disk"), swap_folder=tmp_path / "none")


def test_compiled_and_scripted_blocks_are_refused_by_name() -> None:
    _, model, _, _ = _gpt()
    model.blocks[1].compile(backend="eager")
    with pytest.raises(UnsupportedBlockError, match=r"'blocks.1' is compiled by torch.compile"):
        apply(model, _plan(BlockPlan("blocks.1", 0, "", ())))
    model.blocks[2].up = torch.compile(model.blocks[2].up, backend="eager")
    with pytest.raises(UnsupportedBlockError, match=r"'blocks.2.up' is compiled by torch.compile"):
        apply(model, _plan(BlockPlan("blocks.2", 0, "", ())))


def _gradients(case, called: nn.Module, model: nn.Module, inputs) -> list[torch.Tensor]:
    torch.manual_seed(3)
    return list(torch.autograd.grad(step_loss(case, called, inputs), list(model.parameters())))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler's own
@pytest.mark.parametrize("first", ["apply", "compile"])
def test_a_compiled_model_around_planned_blocks(first: str) -> None:
    """What is around the blocks is compiled, the blocks run as written: bitwise as without."""
    case, model, inputs, found = _gpt()
    plain = _gradients(case, model, model, inputs)
    compiled = torch.compile(model, backend="eager") if first == "compile" else None
    with apply(model, make_plan(case, everything(found, Action.RECOMPUTE))) as handle:
        compiled = torch.compile(model, backend="eager") if compiled is None else compiled
        for _ in range(2):
            assert same(_gradients(case, compiled, model, inputs), plain)
        assert (handle.counts.replays, handle.counts.whole) == (6, 0)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler's own
def test_a_block_compiled_under_a_plan() -> None:
    """``block.compile()`` compiles what it calls, and that is the plan's: nothing is compiled, everything is exact."""
    case, model, inputs, found = _gpt()
    plain = _gradients(case, model, model, inputs)
    with apply(model, make_plan(case, everything(found, Action.RECOMPUTE))) as handle:
        for block in model.blocks:
            block.compile(backend="eager")
        for _ in range(2):
            assert same(_gradients(case, model, model, inputs), plain)
        assert (handle.counts.replays, handle.counts.whole) == (6, 0)


def test_a_plan_made_for_another_dtype_of_the_same_size() -> None:
    case, model, inputs, _ = _gpt()
    found = templates(case, model.bfloat16(), inputs)
    plan = _plan(*(BlockPlan(path, call, t.signature, ()) for (path, call), t in found.items()))
    with apply(model, plan):
        step_loss(case, model, inputs)
    with apply(model.half(), plan), pytest.raises(PlanMismatchError, match=r"plan again with .* dtype"):
        step_loss(case, model, inputs)
    _usable(case, model.float(), inputs)


def test_a_block_that_writes_its_parameter() -> None:
    class Clamped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            with torch.no_grad():
                self.weight.clamp_(-0.5, 0.5)
            return (x @ self.weight).sigmoid().exp()

    model = nn.Sequential(Clamped())
    x = torch.randn(3, 4)
    handle = apply(model, _plan(BlockPlan("0", 0, "", (StorageAction(0, 0, Action.RECOMPUTE),))))
    with pytest.raises(UnsupportedBlockError, match=r"block '0' .*overwrites one of its parameters"):
        model(x)
    assert "forward" not in model[0].__dict__
    handle.remove()


def test_inputs_overwritten_before_backward_are_noticed() -> None:
    """Autograd's own check of versions does not work where hooks save: ours must."""
    case, model, inputs, found = _gpt()
    for action in (Action.KEEP, Action.RECOMPUTE):
        actions = everything(found, action)
        if action is Action.KEEP:  # something must be done for the hooks to be there at all
            key = ("blocks.1", 0)
            actions[key] = (StorageAction(13, 0, Action.SWAP), *actions[key][:-1])
        seen: list[torch.Tensor] = []
        hook = model.blocks[1].register_forward_hook(lambda m, args, out, seen=seen: seen.append(args[0]))
        with apply(model, make_plan(case, actions)):
            loss = step_loss(case, model, inputs)
            with torch.no_grad():
                seen[0].add_(1)
            with pytest.raises(
                RuntimeError, match=r"block 'blocks.1'.*modified by an inplace operation|inplace operation.*'blocks.1'"
            ):
                loss.backward()
        hook.remove()


def test_parameters_overwritten_before_backward_are_noticed() -> None:
    case, model, inputs, found = _gpt()
    with apply(model, make_plan(case, everything(found, Action.RECOMPUTE))):
        loss = step_loss(case, model, inputs)
        with torch.no_grad():
            model.blocks[2].up.weight.mul_(2)
        with pytest.raises(RuntimeError, match=r"inplace operation.*'blocks.2'|'blocks.2'.*inplace operation"):
            loss.backward()


def test_a_parameter_that_only_the_replay_reads_is_noticed() -> None:
    """Backward of a sine needs its operand, not the bias that went into it: the replay does."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return (x + self.shift).sin()

    model = nn.Sequential(Shifted())
    with apply(model, _plan(BlockPlan("0", 0, "", (StorageAction(0, 0, Action.RECOMPUTE),)))):
        for changes in (False, True):
            loss = model(torch.randn(3, 4)).sum()
            if changes:
                with torch.no_grad():
                    model[0].shift.add_(1)
                with pytest.raises(RuntimeError, match="'0'"):
                    loss.backward()
            else:
                loss.backward()


def test_an_input_that_only_the_replay_reads_is_noticed() -> None:
    class Doubled(nn.Module):
        def forward(self, x):
            return (x + x).sin()

    model = nn.Sequential(nn.Linear(4, 4), Doubled())
    seen: list[torch.Tensor] = []
    model[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with apply(model, _plan(BlockPlan("1", 0, "", (StorageAction(0, 0, Action.RECOMPUTE),)))):
        loss = model(torch.randn(3, 4)).sum()
        with torch.no_grad():
            seen[0].add_(1)
        with pytest.raises(RuntimeError, match=r"inplace operation.*'1'"):
            loss.backward()


def test_a_forward_that_changes_between_calls_is_noticed() -> None:
    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.times = 0

        def forward(self, x):
            self.times += 1
            return self.inner(x).sigmoid() if self.times % 2 else self.inner(x).view(2, 2, -1).exp()

    model = nn.Sequential(Moody())
    with apply(model, _plan(BlockPlan("0", 0, "", (StorageAction(0, 0, Action.RECOMPUTE),)))):
        loss = model(torch.randn(4, 4)).sum()
        with pytest.raises(RuntimeError, match=r"block '0' saved .* in its replay"):
            loss.backward()


def test_branches_on_data() -> None:
    """A branch taken the other way after recording: the whole block runs again, and everything stays exact."""

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)
            self.other = nn.Linear(8, 8)

        def forward(self, x):
            y = F.dropout(self.inner(x).sigmoid(), 0.3)
            if y.sum().item() + x.sum().item() > 16:
                y = self.other(y).exp() * y
            index = (y > 0.2).nonzero()
            return y.tanh()[index[:, 0], index[:, 1]].square()

    model = nn.Sequential(nn.Linear(8, 8), Branch())
    plan = _plan(BlockPlan("1", 0, "", tuple(StorageAction(n, 0, Action.RECOMPUTE) for n in range(4))))

    def steps() -> list[torch.Tensor]:
        torch.manual_seed(1)
        seen = []
        for n in range(6):
            model.zero_grad()
            loss = model(torch.randn(4, 8) + 3 * (n % 2)).sum()
            loss.backward()
            seen += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        return [*seen, torch.get_rng_state()]

    expected = steps()
    with apply(model, plan) as handle:
        assert same(steps(), expected)
        assert 0 < handle.counts.whole <= handle.counts.replays
