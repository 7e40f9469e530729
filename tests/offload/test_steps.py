"""What a training loop may do around and inside a step: each of it works under a plan as it does without."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memopt.offload import apply
from memopt.planner.values import Action
from tests.offload.models import Case, everything, make_plan, mixture, run, same, step_loss, templates
from tests.offload.prepared import EXACT, with_twin

NAMES = ("gpt", "resnet", "views")


@pytest.mark.parametrize("name", NAMES)
def test_gradient_accumulation(name: str) -> None:
    case, model, twin, data, found = with_twin(name)
    with apply(model, make_plan(case, mixture(found, 5, EXACT))):
        assert same(run(case, model, data, accumulate=2), run(case, twin, data, accumulate=2))


@pytest.mark.parametrize("name", [*NAMES, "twice"])
def test_evaluation_between_forward_and_backward(name: str) -> None:
    """Two forwards before either backward, and an evaluation without gradients between."""
    case, model, twin, data, found = with_twin(name)

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
    case, model, twin, data, found = with_twin("gpt")

    def steps(module: nn.Module) -> list[Tensor]:
        torch.manual_seed(9)
        loss = step_loss(case, module, data[0])
        loss.backward(retain_graph=True)
        loss.backward()
        return [p.grad for p in module.parameters()]

    with apply(model, make_plan(case, everything(found, action))):
        assert same(steps(model), steps(twin))


def test_gradients_of_a_part_only() -> None:
    case, model, twin, data, found = with_twin("gpt")

    def steps(module: nn.Module) -> list[Tensor]:
        torch.manual_seed(9)
        loss = step_loss(case, module, data[0])
        wanted = [module.blocks[1].up.weight, module.blocks[2].norm1.bias]
        return list(torch.autograd.grad(loss, wanted))

    with apply(model, make_plan(case, mixture(found, 1, EXACT))):
        assert same(steps(model), steps(twin))


def test_frozen_block_and_frozen_parameters() -> None:
    case, model, twin, data, found = with_twin("gpt")
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
    case, model, twin, data, found = with_twin("gpt")

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
    case, model, twin, data, found = with_twin("gpt")
    data = [data[0], tuple(t[:2] for t in data[1]), tuple(t[:, :9] for t in data[2]), data[3]]
    with apply(model, make_plan(case, mixture(found, 3, EXACT))):
        assert same(run(case, model, data), run(case, twin, data))


def test_eval_mode_with_gradients() -> None:
    case, model, twin, data, found = with_twin("resnet")

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
    case, model, twin, data, found = with_twin("gpt")

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
    case, model, twin, data, _ = with_twin("gpt")
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
    case, model, twin, data, found = with_twin("gpt")

    def steps(module: nn.Module) -> list[Tensor]:
        module.blocks[1].attention.register_forward_hook(lambda m, a, o: o * 1.5)
        module.blocks[2].up.register_full_backward_hook(lambda m, gi, go: (gi[0] * 0.5,))
        return run(case, module, data)

    with apply(model, make_plan(case, everything(found, Action.KEEP))):
        expected = steps(twin)
    found = templates(case, model, data[0])
    with apply(model, make_plan(case, {})):
        assert same(steps(model), expected)


def test_double_backward_is_refused_by_name() -> None:
    case, model, _, data, found = with_twin("gpt")
    with apply(model, make_plan(case, everything(found, Action.RECOMPUTE))):
        loss = step_loss(case, model, data[0])
        with pytest.raises(RuntimeError, match=r"'blocks.2'.*cannot be differentiated twice.*handle.remove"):
            torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
