"""What a training loop may do around and inside a step: each of it works under a plan as it does without."""

from __future__ import annotations

import copy
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memopt.offload import apply
from memopt.planner.values import Action, BlockPlan, StorageAction
from tests.offload.models import CASES, Case, everything, make_plan, mixture, run, same, step_loss, templates
from tests.offload.test_mixtures import EXACT

NAMES = ("gpt", "resnet", "views")


def _setup(name: str, seed: int = 3, batches: int = 4):
    case = CASES[name]
    generator = torch.Generator().manual_seed(seed)
    data = [case.inputs(generator) for _ in range(batches)]
    torch.manual_seed(seed)
    model = case.make()
    twin = copy.deepcopy(model)
    return case, model, twin, data, templates(case, model, data[0])


@pytest.mark.parametrize("name", NAMES)
def test_gradient_accumulation(name: str) -> None:
    case, model, twin, data, found = _setup(name)
    with apply(model, make_plan(case, mixture(found, 5, EXACT))):
        assert same(run(case, model, data, accumulate=2), run(case, twin, data, accumulate=2))


@pytest.mark.parametrize("name", [*NAMES, "twice"])
def test_evaluation_between_forward_and_backward(name: str) -> None:
    """Two forwards before either backward, and an evaluation without gradients between."""
    case, model, twin, data, found = _setup(name)

    def steps(module: nn.Module) -> list[Tensor]:
        torch.manual_seed(9)
        first = step_loss(case, module, data[0])
        with torch.no_grad():
            seen = [step_loss(case, module, data[1])]
        second = step_loss(case, module, data[2])
        (first * 2).backward()
        second.backward()
        return [*seen, *(p.grad for p in module.parameters()), *module.state_dict().values(), torch.get_rng_state()]

    with apply(model, make_plan(case, mixture(found, 6, EXACT))):
        assert same(steps(model), steps(twin))


@pytest.mark.parametrize("action", EXACT)
def test_backward_twice_over_a_retained_graph(action: Action) -> None:
    case, model, twin, data, found = _setup("gpt")

    def steps(module: nn.Module) -> list[Tensor]:
        torch.manual_seed(9)
        loss = step_loss(case, module, data[0])
        loss.backward(retain_graph=True)
        loss.backward()
        return [p.grad for p in module.parameters()]

    with apply(model, make_plan(case, everything(found, action))):
        assert same(steps(model), steps(twin))


def test_gradients_of_a_part_only() -> None:
    case, model, twin, data, found = _setup("gpt")

    def steps(module: nn.Module) -> list[Tensor]:
        torch.manual_seed(9)
        loss = step_loss(case, module, data[0])
        wanted = [module.blocks[1].up.weight, module.blocks[2].norm1.bias]
        return list(torch.autograd.grad(loss, wanted))

    with apply(model, make_plan(case, mixture(found, 1, EXACT))):
        assert same(steps(model), steps(twin))


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_exception_in_a_step_leaves_nothing_behind(where: str) -> None:
    case, model, twin, data, found = _setup("gpt")
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
    case, model, _, data, found = _setup("twice")
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
    case, model, twin, data, found = _setup("gpt")
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
    case, model, twin, data, found = _setup("gpt")
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
    case, model, _, data, found = _setup("gpt")
    with apply(model, make_plan(case, everything(found, Action.RECOMPUTE))):
        other = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(0.5)
        torch.manual_seed(0)
        ours = step_loss(case, other, data[0])
    torch.manual_seed(0)
    assert torch.equal(ours, step_loss(case, other, data[0]))


def test_frozen_block_and_frozen_parameters() -> None:
    case, model, twin, data, found = _setup("gpt")
    for module in (model, twin):
        module.blocks[0].requires_grad_(False)
        module.blocks[1].up.weight.requires_grad_(False)
        module.token.weight.requires_grad_(False)
        module.position.weight.requires_grad_(False)
    found = templates(case, model, data[0])
    for seed in range(4):
        with apply(model, make_plan(case, mixture(found, seed, EXACT))):
            assert same(run(case, model, data), run(case, twin, data))


def test_freezing_after_the_first_step() -> None:
    case, model, twin, data, found = _setup("gpt")

    def steps(module: nn.Module) -> list[Tensor]:
        seen = run(case, module, data)
        module.blocks[1].requires_grad_(False)
        module.zero_grad()
        seen += run(case, module, data)
        module.blocks[1].requires_grad_(True)
        return seen + run(case, module, data)

    with apply(model, make_plan(case, mixture(found, 3, EXACT))):
        assert same(steps(model), steps(twin))


def test_other_shapes_after_the_first_step() -> None:
    case, model, twin, data, found = _setup("gpt")
    data = [data[0], tuple(t[:2] for t in data[1]), tuple(t[:, :9] for t in data[2]), data[3]]
    with apply(model, make_plan(case, mixture(found, 3, EXACT))):
        assert same(run(case, model, data), run(case, twin, data))


def test_eval_mode_with_gradients() -> None:
    case, model, twin, data, found = _setup("resnet")

    def steps(module: nn.Module) -> list[Tensor]:
        seen = run(case, module, data)
        module.eval()
        seen += run(case, module, data)
        loss = step_loss(case, module, data[0])
        module.train()  # between forward and backward
        loss.backward()
        return seen + [p.grad for p in module.parameters()]

    with apply(model, make_plan(case, everything(found, Action.RECOMPUTE))):
        assert same(steps(model), steps(twin))


@pytest.mark.parametrize("reentrant", [False, True])
def test_blocks_under_checkpoint(reentrant: bool) -> None:
    case, model, twin, data, found = _setup("gpt")

    class Outer(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, tokens, targets):
            x = self.inner.token(tokens) + self.inner.position.weight[: tokens.shape[1]]
            for block in self.inner.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant)
            return F.cross_entropy(self.inner.head(self.inner.norm(x)).flatten(0, -2), targets.flatten())

    plan = make_plan(case, mixture(found, 3, EXACT))
    for block in plan.blocks:
        object.__setattr__(block, "path", "inner." + block.path)
    outer = Outer(model)
    with apply(outer, plan):
        assert same(run(case, outer, data), run(case, Outer(twin), data))


def test_a_planned_block_inside_a_planned_block() -> None:
    case, model, twin, data, _ = _setup("gpt")
    both = Case(case.make, case.inputs, ("blocks.1", "blocks.1.attention"))
    for seed in range(6):
        found = templates(both, model, data[0])
        state = copy.deepcopy(model.state_dict())
        with apply(model, make_plan(both, mixture(found, seed, EXACT))):
            ours = run(case, model, data)
        assert same(ours, run(case, copy_with(twin, state), data)), seed


def copy_with(twin: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    twin.load_state_dict(state)
    twin.zero_grad()
    return twin


def test_hooks_of_the_user_inside_a_block() -> None:
    case, model, twin, data, found = _setup("gpt")

    def steps(module: nn.Module) -> list[Tensor]:
        module.blocks[1].attention.register_forward_hook(lambda m, a, o: o * 1.5)
        module.blocks[2].up.register_full_backward_hook(lambda m, gi, go: (gi[0] * 0.5,))
        return run(case, module, data)

    with apply(model, make_plan(case, everything(found, Action.KEEP))):
        expected = steps(twin)
    found = templates(case, model, data[0])
    with apply(model, make_plan(case, {})):
        assert same(steps(model), expected)


def test_nothing_outlives_the_graph() -> None:
    case, model, _, data, found = _setup("gpt")
    seen: list[weakref.ref] = []
    model.blocks[1].register_forward_pre_hook(lambda m, args: seen.append(weakref.ref(args[0])))
    gc.disable()
    try:
        for action in EXACT:
            with apply(model, make_plan(case, everything(found, action))):
                for batch in data[:2]:
                    step_loss(case, model, batch).backward()
                    assert all(ref() is None for ref in seen)
    finally:
        gc.enable()


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


def test_double_backward_is_refused_by_name() -> None:
    case, model, _, data, found = _setup("gpt")
    with apply(model, make_plan(case, everything(found, Action.RECOMPUTE))):
        loss = step_loss(case, model, data[0])
        with pytest.raises(RuntimeError, match=r"'blocks.2'.*cannot be differentiated twice.*handle.remove"):
            torch.autograd.grad(loss, list(model.parameters()), create_graph=True)


def test_a_graph_that_never_runs_backward_is_freed() -> None:
    """A saved output leads to the operation that saved it; holding it as it is would be a cycle through C++."""
    case, model, _, data, found = _setup("gpt")
    seen: list[weakref.ref] = []
    model.blocks[1].attention.register_forward_hook(lambda m, args, out: seen.append(weakref.ref(out)))
    for action in EXACT:
        with apply(model, make_plan(case, mixture(found, 1, (Action.SWAP, action)), "disk")) as handle:
            for batch in data[:2]:
                step_loss(case, model, batch)
                gc.collect()
                assert all(ref() is None for ref in seen)
                assert handle.tier.held_bytes == 0
