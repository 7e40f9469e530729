"""What cannot work is refused by name, before a step has begun; what a plan leaves out is said."""

from __future__ import annotations

import copy
import gc
import io
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import memopt
from examples.gpt import GPT, GPTConfig
from memopt.offload import PlanMismatchError, ReplayError, Reversible, UnsupportedBlockError, apply, tile
from memopt.offload.tiers.disk import DiskTier
from memopt.planner.values import Action
from tests.offload.models import CASES, Case, everything, make_plan, mixture, same, step_loss, templates
from tests.offload.prepared import EXACT, with_twin

SMALL = GPTConfig(layers=2, width=32, heads=4, context=16, vocabulary=17)
TOKENS = torch.randint(17, (3, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def plan():
    model = GPT(SMALL)
    traced = memopt.trace(model, (TOKENS, TOKENS))
    fixed = 2 * sum(parameter.nbytes for parameter in model.parameters())
    return memopt.plan(traced, fixed + int(0.7 * (traced.peak_bytes - fixed)), "cpu", time_limit=1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda model: model.to(torch.bfloat16), r"'blocks.0' \(call 0\): saved storage . has .* made for"),
        (lambda model: GPT(replace(SMALL, width=64)), r"'blocks.0' \(call 0\): saved storage . has .* made for"),
        (
            lambda model: GPT(replace(SMALL, dropout=0.1)),
            r"'blocks.0' \(call 0\): its operations|made for|saves",
        ),
        (lambda model: GPT(replace(SMALL, layers=1)), "'blocks.1', which GPT lacks"),
        (lambda model: nn.Sequential(model), "'blocks.0', which Sequential lacks; the model has 0.blocks.0"),
    ],
)
def test_a_plan_for_another_model(plan, change, says: str) -> None:
    torch.manual_seed(0)
    model = change(GPT(SMALL))
    with pytest.raises(PlanMismatchError, match=says), memopt.apply(model, plan):
        model(TOKENS, TOKENS)
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("shape", [(2, 16), (3, 8)])
def test_a_plan_for_another_batch(plan, shape: tuple[int, int]) -> None:
    model, tokens = GPT(SMALL), TOKENS[: shape[0], : shape[1]]
    memopt.apply(model, plan)
    with pytest.raises(PlanMismatchError, match="plan again with the shapes and the dtype that you train with"):
        model(tokens, tokens)
    model(tokens, tokens).backward()


def test_a_plan_under_which_nothing_fits() -> None:
    model = GPT(SMALL)
    infeasible = memopt.plan(memopt.trace(model, (TOKENS, TOKENS)), 1, "cpu", time_limit=1)
    with pytest.raises(PlanMismatchError, match=rf"of 1 bytes.* least {infeasible.smallest_budget_bytes} bytes"):
        memopt.apply(model, infeasible)


def test_blocks_that_the_plan_does_not_know(plan) -> None:
    with pytest.warns(UserWarning, match=r"does not know blocks.2, of the same class"):
        memopt.apply(GPT(replace(SMALL, layers=3)), plan).remove()


def test_data_parallel(plan) -> None:
    model = GPT(SMALL)
    with pytest.raises(UnsupportedBlockError, match="DistributedDataParallel"):
        memopt.apply(nn.DataParallel(model), plan)
    with memopt.apply(model, plan), pytest.raises(UnsupportedBlockError, match=r"GPT runs inside a torch\.nn\.Data"):
        model._replicate_for_data_parallel()(TOKENS, TOKENS)


def test_a_planned_model_is_not_pickled_and_its_state_is_its_own(plan) -> None:
    model = GPT(SMALL)
    names = [name for name, _ in model.named_modules()], list(model.state_dict())
    with memopt.apply(model, plan):
        assert names == ([name for name, _ in model.named_modules()], list(model.state_dict()))
        with pytest.raises(TypeError, match="GPT runs under a memopt plan and cannot be pickled"):
            torch.save(model, io.BytesIO())
    torch.save(model, io.BytesIO())


def test_a_forward_covered_meanwhile_runs_plain_after_removal() -> None:
    case, model, _, data, found = with_twin("gpt")
    handle = apply(model, make_plan(case, everything(found, Action.RECOMPUTE)))
    planned = model.blocks[0].forward
    model.blocks[0].forward = lambda x: planned(x)
    handle.remove()
    step_loss(case, model, data[0]).backward()
    assert handle.counts.replays == 0


def test_removal_in_the_middle_of_forward_and_of_backward() -> None:
    case, model, twin, data, found = with_twin("gpt")
    plan = make_plan(case, everything(found, Action.RECOMPUTE))
    seen: list[list[Tensor]] = []
    for module in (twin, model, model):
        torch.manual_seed(3)
        hooks = []
        if module is model:
            handle = apply(model, plan)
            stop = lambda *_, handle=handle: handle.remove()  # noqa: E731
            hooks = [model.blocks[1].register_forward_pre_hook(stop), model.blocks[1].up.weight.register_hook(stop)]
            hooks.pop(len(seen) - 1).remove()
        seen.append(list(torch.autograd.grad(step_loss(case, module, data[0]), list(module.parameters()))))
        [hook.remove() for hook in hooks]
    assert same(seen[0], seen[1])
    assert same(seen[0], seen[2])


def test_what_a_hook_inside_a_block_keeps_is_named() -> None:
    case, model, _, data, found = with_twin("gpt")
    kept: dict[str, Tensor] = {}
    model.blocks[1].up.register_forward_hook(lambda module, args, output: kept.update(up=output))
    with apply(model, make_plan(case, everything(found, Action.RECOMPUTE))):
        step_loss(case, model, data[0]).backward()
    with pytest.raises(ReplayError, match="a hook inside it, makes"):
        kept["up"].sum()


@pytest.mark.parametrize("action", EXACT)
def test_hooks_keep_their_order(action: Action) -> None:
    case, model, twin, data, found = with_twin("gpt", batches=2)

    def steps(module: nn.Module) -> tuple[list[str], list[Tensor]]:
        log: list[str] = []
        block = module.blocks[1]
        block.register_forward_pre_hook(lambda m, args: log.append("before") or (args[0] * 1.5,))
        block.register_forward_hook(lambda m, args, output: log.append("after") or output * 0.5)
        block.register_full_backward_pre_hook(lambda m, grads: log.append("back before"))
        block.register_full_backward_hook(lambda m, into, out: log.append("back after") or (into[0] * 2,))
        block.up.register_full_backward_pre_hook(lambda m, grads: log.append("inner back before"))
        block.up.register_full_backward_hook(lambda m, into, out: log.append("inner back after") or (into[0] * 2,))
        seen = []
        for n, batch in enumerate(data):
            torch.manual_seed(n)
            seen += torch.autograd.grad(step_loss(case, module, batch), list(module.parameters()))
        return log, seen

    expected = steps(twin)
    with apply(model, make_plan(case, everything(found, action))):
        ours = steps(model)
    assert ours[0] == expected[0]
    assert same(ours[1], expected[1])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_inside_a_block(reentrant: bool) -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)
            self.mlp = nn.Sequential(self.up, nn.GELU(), nn.Dropout(0.2), self.down)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x + torch.utils.checkpoint.checkpoint(self.mlp, x.sin(), use_reentrant=reentrant)).exp()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.blocks = nn.Linear(8, 8), nn.Sequential(Half(), Half())

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks(self.first(x)).square().mean()

    torch.manual_seed(0)
    case = Case(Model, lambda g: (torch.randn(4, 8, generator=g),), ("blocks.0", "blocks.1"))
    model = Model()
    twin, x = copy.deepcopy(model), torch.randn(4, 8)
    found = templates(case, model, (x,))
    plans = [everything(found, action) for action in EXACT] + [mixture(found, seed, EXACT) for seed in range(3)]
    for actions in plans:
        seen = []
        for module in (twin, model):
            torch.manual_seed(1)
            with apply(model, make_plan(case, actions)):
                module(x).backward()
            seen.append([parameter.grad for parameter in module.parameters()])
            module.zero_grad()
        assert same(*seen)


def test_gradient_scaling_under_autocast() -> None:
    _, model, twin, data, _ = with_twin("gpt")

    case = CASES["gpt-autocast"]
    found = templates(case, model, data[0])

    def steps(module: nn.Module) -> list[Tensor]:
        torch.manual_seed(0)
        scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=1024.0), torch.optim.SGD(module.parameters(), lr=0.1)
        for batch in data:
            scaler.scale(step_loss(case, module, batch)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return list(module.state_dict().values())

    with apply(model, make_plan(case, mixture(found, 4, EXACT))):
        assert same(steps(model), steps(twin))


def test_a_model_run_by_several_threads() -> None:
    case, model, twin, data, found = with_twin("resnet")
    model.eval()  # statistics of the batch would follow the order of the threads
    twin.eval()
    found = templates(case, model, data[0])
    exact: list[bool] = []

    def work(first: int) -> None:
        for n in range(4):
            batch = data[(first + n) % 4]
            seen = [torch.autograd.grad(step_loss(case, m, batch), list(m.parameters())) for m in (model, twin)]
            exact.append(same(list(seen[0]), list(seen[1])))

    with apply(model, make_plan(case, mixture(found, 5, EXACT), "disk")) as handle:
        step_loss(case, model, data[0]).backward()
        threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        del threads
        gc.collect()
        assert handle.tier.held_bytes == 0
    assert exact == [True] * 12


def test_an_extent_given_back_in_the_middle_of_handing_one_out(tmp_path) -> None:
    """The garbage collector may end a slot at any moment, also while the list of free extents is being walked."""
    tier = DiskTier(tmp_path, None)
    offsets = [tier.allocate(4096) for _ in range(6)]

    class Reentrant(list):
        def __iter__(self):
            for n, extent in enumerate(super().__iter__()):
                if n == 0:
                    tier.free(*offsets[1])
                yield extent

    tier.free(*offsets[4])
    tier._free = Reentrant()
    taken = [tier.allocate(4096) for _ in range(3)]
    assert len({*taken, offsets[0], offsets[2], offsets[3], offsets[5]}) == 7


def test_reversible_refuses_what_it_cannot_do() -> None:
    x = torch.randn(2, 4, requires_grad=True)
    stack = Reversible([(nn.Linear(4, 4), nn.Tanh())])
    with pytest.raises(RuntimeError, match="Reversible stack cannot be differentiated twice"):
        torch.autograd.grad(sum(y.square().sum() for y in stack(x, x)), x, create_graph=True)
    with pytest.raises(ValueError, match=r"Linear of a reversible pair returned \(2, 1\) for an input of .*\(2, 4\)"):
        Reversible([(nn.Linear(4, 1), nn.Tanh())])(x, x)


def test_tile_refuses_what_it_cannot_do() -> None:
    linear, x = nn.Linear(8, 8), torch.randn(2, 6, 8)
    for chunks in (1, 2.5):
        with pytest.raises(ValueError, match=f"chunks is {chunks}; .* at least 2"):
            tile(linear, chunks, inputs=(x,))
    with pytest.raises(ValueError, match=r"dim is 5; the input .* has 3 dimensions"):
        tile(linear, 2, inputs=(x,), dim=5)
    with tile(linear, 2, inputs=(x,)):
        with pytest.raises(ValueError, match="Linear runs in tiles already"):
            tile(linear, 3, inputs=(x,))
        with pytest.raises(TypeError, match="first positional argument; got 0 positional ones and input"):
            linear(input=x)
    assert "forward" not in linear.__dict__


def test_a_plan_that_is_no_plan() -> None:
    with pytest.raises(TypeError, match="without blocks"):
        apply(nn.Linear(1, 1), SimpleNamespace(swap_tier="none"))
