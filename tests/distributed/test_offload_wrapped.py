"""An applied plan under DDP and FSDP2: on every rank bitwise what the same wrapper gives without a plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from examples.gpt import GPT, GPTConfig
from memopt.offload import apply
from memopt.planner.values import Action
from tests.distributed.ranks import run_ranks
from tests.offload.models import CASES, make_plan, mixture, templates

CONFIG = GPTConfig(layers=3, width=32, heads=4, context=16, vocabulary=17, dropout=0.1)
EXACT = (Action.KEEP, Action.SWAP, Action.RECOMPUTE)


def _model(wrapper: str) -> tuple[nn.Module, nn.Module]:
    """The wrapped model and the model inside it."""
    torch.manual_seed(3)
    model = GPT(CONFIG)
    if wrapper == "ddp":
        return DistributedDataParallel(model), model
    if wrapper == "fsdp2":
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    return model, model


def _train(rank: int, wrapper: str, seed: int | None, plan_on_wrapper: bool) -> list[Tensor]:
    case = CASES["gpt"]
    whole, inner = _model(wrapper)
    generator = torch.Generator().manual_seed(100 + rank)
    data = [case.inputs(generator) for _ in range(4)]
    handle = None
    if seed is not None:
        torch.manual_seed(3)
        plan = make_plan(case, mixture(templates(case, GPT(CONFIG), data[0]), seed, EXACT))
        if plan_on_wrapper:
            for block in plan.blocks:
                object.__setattr__(block, "path", "module." + block.path)
        handle = apply(whole if plan_on_wrapper else inner, plan)
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)
    torch.manual_seed(11 + rank)
    seen: list[Any] = []
    for n, inputs in enumerate(data):
        if wrapper == "ddp" and n == 1:
            with whole.no_sync():
                loss = whole(*inputs)
                loss.backward()
            seen.append(loss.detach())
            continue
        loss = whole(*inputs)
        loss.backward()
        seen.append(loss.detach())
        seen += [_local(p.grad) for p in whole.parameters() if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
    seen += [_local(p.detach()) for p in whole.parameters()]
    if handle is not None:
        assert handle.counts.replays > 0
        assert handle.counts.whole == 0, handle.counts.reasons
        handle.remove()
    return [value.clone() for value in seen]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@pytest.mark.parametrize(("wrapper", "on_wrapper"), [("ddp", False), ("ddp", True), ("fsdp2", False)])
def test_plans_under_wrappers(wrapper: str, on_wrapper: bool) -> None:
    plain = run_ranks(_train, 2, wrapper, None, False)
    for seed in (1, 2):
        ours = run_ranks(_train, 2, wrapper, seed, on_wrapper)
        for rank in range(2):
            assert len(ours[rank]) == len(plain[rank])
            assert all(torch.equal(a, b) for a, b in zip(ours[rank], plain[rank], strict=True))
