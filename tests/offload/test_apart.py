"""Beside plans: reversible stacks, tiles, query blocks, optimizers on the host, and the report of a step."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import memopt
from memopt.offload import Reversible, apply, blockwise_attention, tile
from memopt.offload.origin import Counts
from memopt.offload.reporting import compare
from memopt.planner.values import Action, BlockPlan, StorageAction
from tests.offload.models import everything, make_plan, same, step_loss
from tests.offload.prepared import prepared


def _mlp(width: int, dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(3 * width, width)
    )


def _plain(stack: Reversible, x1: torch.Tensor, x2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    for f, g in stack.pairs:
        x1 = x1 + f(x2)
        x2 = x2 + g(x1)
    return x1, x2


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_reversible_gradients(dropout: float) -> None:
    """Float64 gradients agree to what rounding of the rebuilt inputs explains; the outputs are bitwise the same."""
    stack = Reversible((_mlp(6, dropout), _mlp(6, dropout)) for _ in range(4)).double()
    inputs = [torch.randn(3, 6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    results = []
    for run in (stack, lambda a, b: _plain(stack, a, b)):
        torch.manual_seed(5)
        y1, y2 = run(*inputs)
        gradients = torch.autograd.grad((y1 * y2.sin()).sum(), [*inputs, *stack.parameters()])
        results.append((y1, y2, gradients, torch.get_rng_state()))
    ours, plain = results
    assert torch.equal(ours[0], plain[0])
    assert torch.equal(ours[1], plain[1])
    assert torch.equal(ours[3], plain[3])
    for a, b in zip(ours[2], plain[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_reversible_memory_does_not_grow_with_depth() -> None:
    def saved(depth: int) -> int:
        stack = Reversible((_mlp(16), _mlp(16)) for _ in range(depth))
        total = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            stack(torch.randn(8, 16, requires_grad=True), torch.randn(8, 16))
        return total

    assert saved(2) == saved(9) == 2 * 8 * 16 * 4


def test_reversible_refuses_streams_that_differ() -> None:
    with pytest.raises(ValueError, match="the two streams must be alike"):
        Reversible([(_mlp(4), _mlp(4))])(torch.zeros(2, 4), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="at least one pair"):
        Reversible([])


@pytest.mark.parametrize("recompute", [False, True])
def test_tiles_of_a_feed_forward(recompute: bool) -> None:
    mlp = _mlp(16)
    x = torch.randn(2, 10, 16, requires_grad=True)
    plain = mlp(x)
    expected = torch.autograd.grad(plain.square().sum(), [x, *mlp.parameters()])
    with tile(mlp, 4, inputs=(x,), recompute=recompute) as tiled:
        assert tiled.dim == 1
        ours = mlp(x)
        found = torch.autograd.grad(ours.square().sum(), [x, *mlp.parameters()])
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert "forward" not in mlp.__dict__


@pytest.mark.parametrize(
    "swapped", [(0, 2), (), (0,), (0, 1, 2), (0, 1, 2, 3)], ids=["alternate", "0", "1/4", "3/4", "1"]
)
def test_tiles_each_with_its_own_action(swapped: tuple[int, ...]) -> None:
    """MEMO's fraction in quarters: those tiles are swapped, the others recomputed; bitwise the tiled plain run."""
    model = nn.Sequential(nn.Linear(16, 16), _mlp(16, 0.2))
    x = torch.randn(2, 8, 16)

    def step() -> list[torch.Tensor]:
        torch.manual_seed(2)
        return list(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))

    with tile(model[1], 4, inputs=(x,), recompute=False):
        expected = step()
    actions = [Action.SWAP if n in swapped else Action.RECOMPUTE for n in range(4)]
    plan = SimpleNamespace(
        blocks=tuple(
            BlockPlan("1", n, "", tuple(StorageAction(i, 0, a) for i in range(4))) for n, a in enumerate(actions)
        ),
        swap_tier="disk",
    )
    with apply(model, plan) as handle, tile(model[1], 4, inputs=(x,), recompute=False):
        for _ in range(3):
            assert same(step(), expected)
        assert handle.counts.replays == 3 * (4 - len(swapped))
        assert (handle.tier.moved_bytes > 0) == bool(swapped)
    assert "forward" not in model[1].__dict__


def test_tiles_find_the_axis_or_refuse() -> None:
    class Mixer(nn.Module):
        def forward(self, x):
            return x - x.mean(1, keepdim=True)

    class Everything(nn.Module):
        def forward(self, x):
            return x - x.mean()

    assert tile(Mixer(), 2, inputs=(torch.randn(4, 6, 3),)).dim == 0
    with pytest.raises(ValueError, match=r"Everything gives another output .* along dim 1, 0: it mixes positions"):
        tile(Everything(), 2, inputs=(torch.randn(4, 6, 3),))
    with pytest.raises(ValueError, match="chunks is 1"):
        tile(Mixer(), 1, inputs=(torch.randn(4, 6, 3),))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(12, 12), (5, 9), (1, 7)])
@pytest.mark.parametrize("chunks", [1, 3])
def test_attention_by_query_blocks(causal: bool, queries: int, keys: int, chunks: int) -> None:
    q = torch.randn(2, 3, queries, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 3, keys, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = torch.ones(queries, keys).tril(keys - queries).bool() if causal else None
    whole = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    ours = blockwise_attention(q, k, v, chunks, is_causal=causal)
    torch.testing.assert_close(ours, whole)
    expected = torch.autograd.grad(whole.sin().sum(), [q, k, v])
    for a, b in zip(torch.autograd.grad(ours.sin().sum(), [q, k, v]), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("share", "warns"), [(0.949, True), (0.951, False), (1, False), (1.049, False), (1.051, True)])
def test_more_than_five_percent_off_is_said(share: float, warns: bool) -> None:
    plan = SimpleNamespace(peak_bytes=1000 * 2**20, swapped_bytes=100 * 2**20)
    got = int(share * plan.peak_bytes), int(share * plan.swapped_bytes)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        report = compare(plan, *got, 0.25, Counts())
        compare(plan, None, plan.swapped_bytes, 0.0, Counts())  # where the peak is not metered, nothing is said of it
    assert [("of peak" in str(w.message), "of swapped bytes" in str(w.message)) for w in said] == (
        [(True, False), (False, True)] if warns else []
    )
    assert (report.metered_peak_bytes, report.swapped_bytes, report.stall_seconds) == (*got, 0.25)


def test_the_report_of_a_step() -> None:
    case, model, _, batches, _, found = prepared("gpt", 2)
    actions = everything(found, Action.SWAP)
    swapped = sum(a.bytes for some in actions.values() for a in some)
    plan = make_plan(case, actions, "disk")
    plan.peak_bytes, plan.swapped_bytes = 400_000, swapped
    with apply(model, plan) as handle:
        with memopt.meter(model) as meter:
            step_loss(case, model, batches[0]).backward()
        with pytest.warns(UserWarning, match=r"promised 0.4 MiB of peak, the step took"):
            report = handle.step_report(meter.peak_bytes)
        assert report.swapped_bytes == swapped
        assert report.whole_replays == 0
        assert "peak: planned 0.4 MiB" in str(report)
        plan.peak_bytes = meter.peak_bytes
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            step_loss(case, model, batches[1]).backward()
            assert handle.report is not None
