"""A plan in tiles under DDP and FSDP2: on every rank bitwise the same tiles without a plan."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import memopt
from memopt.offload import Tiled
from tests.distributed.ranks import run_ranks
from tests.offload.tiled import TILES, Model


def _plan(x: Tensor) -> memopt.planner.Plan:
    traced = memopt.trace(Model(), (x,), tiles=4)
    assert traced.tiles == TILES
    weights = sum(p.nbytes for p in Model().parameters())
    budget = 2 * weights + int(0.5 * (traced.peak_bytes - 2 * weights))
    return memopt.plan(traced, budget, "cpu", actions=("recompute",))


def _train(rank: int, wrapper: str, planned: bool) -> list[Tensor]:
    torch.manual_seed(0)
    inner = Model()
    whole: nn.Module = inner
    x = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(100 + rank))
    plan = _plan(x)
    if wrapper == "ddp":
        whole = DistributedDataParallel(inner)
    else:
        for layer in inner.layers:
            fully_shard(layer)
        fully_shard(inner)
    handle = memopt.apply(inner, plan) if planned else None
    tiles = [] if planned else [Tiled(inner.get_submodule(t.path), t.chunks, t.dim) for t in TILES]
    torch.manual_seed(11 + rank)
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)
    seen = []
    with handle or nullcontext():
        for _ in range(2):
            loss = whole(x)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(loss.detach())
        if handle is not None:
            assert handle.counts.replays > 0
            assert handle.counts.whole == 0, handle.counts.reasons
    for tiled in tiles:
        tiled.remove()
    parameters = [p.detach() for p in whole.parameters()]
    return [*seen, *(p.to_local() if isinstance(p, DTensor) else p for p in parameters)]


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_tiles_of_a_plan_under_wrappers(wrapper: str) -> None:
    plain, ours = run_ranks(_train, 2, wrapper, False), run_ranks(_train, 2, wrapper, True)
    for mine, theirs in zip(ours, plain, strict=True):
        assert len(mine) == len(theirs)
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
