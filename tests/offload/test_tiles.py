"""Steps traced in tiles: which modules are cut, what their plans gain, and that they are carried out."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

import memopt
from memopt.offload import PlanMismatchError
from memopt.planner import plan_in_tiles
from memopt.planner.values import Action, Status
from memopt.wrapping import DoesNotFitError
from tests.offload.models import same
from tests.offload.tiled import TILES, Mlp, Model, by_hand

CLOSE = 0.03


def _model(dropout: float = 0.1) -> tuple[Model, Tensor]:
    torch.manual_seed(0)
    return Model(dropout=dropout), torch.randn(2, 256, 64)


@functools.cache
def _traced(tiles: int, autocast: torch.dtype | None = None) -> memopt.planner.Trace:
    model, x = _model()
    return memopt.trace(model, (x,), autocast=autocast, tiles=tiles)


@functools.cache
def _least(tiles: int, autocast: torch.dtype | None = None) -> int:
    """The smallest budget that fits."""
    smallest = memopt.plan(_traced(tiles, autocast), 1, "cpu", time_limit=5).smallest_budget_bytes
    assert smallest is not None
    return smallest


def _step(model: nn.Module, x: Tensor, autocast: torch.dtype | None = None) -> list[Tensor]:
    torch.manual_seed(3)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        loss = model(x)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def _clean_step(model: nn.Module, x: Tensor, autocast: torch.dtype | None = None) -> list[Tensor]:
    found = [value.clone() for value in _step(model, x, autocast)]
    model.zero_grad()
    return found


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "autocast"])
def test_a_plan_in_tiles_fits_where_none_fits_without_and_is_true(autocast: torch.dtype | None) -> None:
    model, x = _model()
    traced, smallest = _traced(4, autocast), _least(4, autocast)
    assert traced.tiles == TILES
    assert smallest < _least(1, autocast)
    with by_hand(model, x):
        expected = _clean_step(model, x, autocast)
    plan = memopt.plan(traced, smallest, "cpu", time_limit=5)
    with memopt.apply(model, plan) as handle:
        assert same(_clean_step(model, x, autocast), expected)
        with memopt.meter(model) as meter:
            _step(model, x, autocast)
        assert abs(meter.peak_bytes / plan.peak_bytes - 1) <= CLOSE
        assert handle.counts.replays > 0
        assert handle.counts.whole == 0
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_tiles_are_the_whole_up_to_rounding() -> None:
    model, x = _model(dropout=0.0)
    twin = Model(dropout=0.0).double()
    twin.load_state_dict(model.state_dict())
    exact = _clean_step(twin, x.double())
    plain = _clean_step(model, x)
    traced = memopt.trace(model, (x,), tiles=4)
    with memopt.apply(model, memopt.plan(traced, hardware="cpu")):
        ours = _clean_step(model, x)
    for truth, theirs, mine in zip(exact, plain, ours, strict=True):
        floor = torch.finfo(torch.float32).eps * truth.abs().max()
        assert (mine - truth).abs().max() <= 2 * (theirs - truth).abs().max() + floor


def test_tiles_of_one_module_have_actions_of_their_own() -> None:
    """Between the least and all, a plan treats tiles of one module differently: MEMO's fraction, in quarters."""
    model, x = _model()
    traced = _traced(4)
    plan = memopt.plan(traced, (_least(4) + traced.peak_bytes) // 2, "cpu", actions=("recompute",), time_limit=5)
    mixed = 0
    for block, part in zip(traced.blocks, plan.blocks, strict=True):
        sizes = {one.index: (traced.ops[one.producer].name, one.bytes) for one in block.saved}
        by_kind: dict[tuple[str, int], set[Action]] = {}
        for one in part.actions:
            by_kind.setdefault(sizes[one.index], set()).add(one.action)
        mixed += any(len(actions) > 1 for actions in by_kind.values())
    assert mixed
    with by_hand(model, x):
        expected = _clean_step(model, x)
    with memopt.apply(model, plan):
        assert same(_clean_step(model, x), expected)


def test_only_what_treats_rows_alike_is_cut() -> None:
    class Mixing(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(1, keepdim=True))

    class Folding(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.transpose(0, 1)).transpose(0, 1)

    class Shifted(Mlp):
        def __init__(self, width: int, dropout: float) -> None:
            super().__init__(width, dropout)
            self.positions = nn.Parameter(torch.zeros(256, width))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + self.positions)

    for kind in (Mixing, Folding, Shifted):
        model, x = _model()
        model.layers[1].mlp = kind(64, 0.1)
        tiles = memopt.trace(model, (x,), tiles=4).tiles
        assert tiles == tuple(one for one in TILES if one.path != "layers.1.mlp"), kind


def test_a_module_that_is_not_what_was_traced_is_refused_at_its_first_call() -> None:
    model, x = _model()
    plan = memopt.plan(memopt.trace(model, (x,), tiles=4), hardware="cpu")
    own = model.layers[1].mlp.forward
    model.layers[1].mlp.forward = lambda x: own(x) - own(x).mean(1, keepdim=True)
    memopt.apply(model, plan)
    with pytest.raises(PlanMismatchError, match=r"module 'layers\.1\.mlp' cannot run in tiles.*tiles=1"):
        _step(model, x)
    assert all("forward" not in layer.mlp.__dict__ for layer in model.layers if layer is not model.layers[1])
    del model.layers[1].mlp.forward
    with by_hand(model, x, TILES[:1]), pytest.raises(PlanMismatchError, match=r"'layers\.0\.mlp'.*does so already"):
        memopt.apply(model, plan)
    with pytest.raises(ValueError, match="tiles must be a whole number of at least 1, not 0"):
        memopt.trace(model, (x,), tiles=0)


def test_a_trace_keeps_tiles_of_the_users_own_and_takes_a_plans_off() -> None:
    model, x = _model()
    plain, tiled = memopt.trace(model, (x,)), memopt.trace(model, (x,), tiles=4)
    with memopt.apply(model, memopt.plan(tiled, hardware="cpu")):
        assert memopt.trace(model, (x,)).peak_bytes == plain.peak_bytes
    with by_hand(model, x):
        again = memopt.trace(model, (x,))
        assert [block.signature for block in again.blocks] == [block.signature for block in tiled.blocks]
        with memopt.apply(model, memopt.plan(plain, hardware="cpu")), pytest.raises(PlanMismatchError):
            _step(model, x)


def test_a_plan_file_keeps_its_tiles(tmp_path) -> None:
    model, x = _model()
    plan = memopt.plan(memopt.trace(model, (x,), tiles=4), hardware="cpu")
    plan.save(tmp_path / "plan.json")
    assert type(plan).load(tmp_path / "plan.json") == plan
    assert plan.tiles == TILES


def test_tiles_are_taken_only_where_nothing_fits_without() -> None:
    least = _least(8)

    def step(number: int) -> memopt.planner.Trace:
        made.append(number)
        return _traced(number)

    made: list[int] = []
    trace, plan = plan_in_tiles(step, least, "cpu", time_limit=5)
    assert made == [1, 8]
    assert trace.tiles == plan.tiles
    assert {one.chunks for one in plan.tiles} == {8}
    made.clear()
    trace, plan = plan_in_tiles(step, "1GiB", "cpu")
    assert made == [1]
    assert not plan.tiles
    made.clear()
    assert plan_in_tiles(step, 10, "cpu", time_limit=5)[1].status is Status.INFEASIBLE
    assert made == [1], "the weights alone are larger"
    assert plan_in_tiles(step, least, "cpu", tiles=(1,), time_limit=5)[1].status is Status.INFEASIBLE
    with pytest.raises(ValueError, match="tiles names no number"):
        plan_in_tiles(step, least, "cpu", tiles=())


def test_wrap_runs_in_tiles_where_nothing_else_fits() -> None:
    model, x = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    least = _least(8)  # a plain SGD keeps no state
    with pytest.raises(DoesNotFitError):
        memopt.wrap(model, inputs=(x,), optimizer=optimizer, budget=least, hardware="cpu", tiles=1)
    model, optimizer, plan = memopt.wrap(model, inputs=(x,), optimizer=optimizer, budget=least, hardware="cpu")
    for _ in range(2):
        with memopt.meter(model, optimizer) as meter:
            model(x).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert plan.tiles
    assert abs(meter.peak_bytes / plan.peak_bytes - 1) <= CLOSE


def test_where_tiles_cannot_be_the_whole_is_the_answer() -> None:
    """A trace in tiles that fails, or finds nothing to cut, leaves the whole step's plan."""
    whole = _traced(1)
    numbers: list[int] = []

    def step(number: int, fails: bool) -> memopt.planner.Trace:
        numbers.append(number)
        if fails and number > 1:
            raise memopt.planner.TraceError("no tiles")
        return whole

    budget = _least(1) - 1
    for fails in (True, False):
        numbers.clear()
        trace, plan = plan_in_tiles(functools.partial(step, fails=fails), budget, "cpu", time_limit=5)
        assert numbers == [1, 8]
        assert trace is whole
        assert plan.status is Status.INFEASIBLE
    with pytest.raises(memopt.planner.TraceError):
        plan_in_tiles(functools.partial(step, fails=True), budget, "cpu", tiles=(8,))
