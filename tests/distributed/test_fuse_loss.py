"""``memopt.fuse_loss`` under DDP and FSDP2 on two gloo ranks: the gradients are those of the model by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import memopt
from memopt.integrations.lazy_logits import LazyLogits
from tests.distributed.ranks import run_ranks
from tests.distributed.training import batch, made
from tests.optim.coverage_models import tiny

WAYS = ("ddp", "ddp static", "ddp unused", "fsdp", "fsdp head")


class WithLoss(nn.Module):
    """The loss inside the model, as transformers has it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(tokens[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()), logits


def wrapped(way: str, fused: bool) -> nn.Module:
    model = WithLoss(made("fsdp")[1] if way == "fsdp" else tiny())
    if way == "fsdp head":
        fully_shard(model.model.head, reshard_after_forward=False)
        fully_shard(model)
    if fused:
        memopt.fuse_loss(model, head="model.head", chunk_bytes=1024)
    if way.startswith("ddp"):
        options = {"ddp static": {"static_graph": True}, "ddp unused": {"find_unused_parameters": True}}
        return nn.parallel.DistributedDataParallel(model, **options.get(way, {}))
    return model


def gradients(rank: int, way: str, fused: bool, own_loss: bool) -> list[Tensor]:
    module = wrapped(way, fused)
    for step in range(2):
        module.zero_grad(set_to_none=True)
        tokens = batch(step, rank, 2)
        loss, logits = module(tokens)
        assert isinstance(logits, LazyLogits) == fused
        if own_loss:
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
    return [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in module.parameters()]


def work(rank: int) -> dict[Any, list[list[Tensor]]]:
    return {
        (way, own): [gradients(rank, way, fused, own) for fused in (False, True)]
        for way in WAYS
        for own in (False, True)
    }


@pytest.fixture(scope="module")
def results() -> list[dict[Any, list[list[Tensor]]]]:
    return run_ranks(work, 2)


@pytest.mark.parametrize("own_loss", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_the_stock_model_s(results: Any, way: str, own_loss: bool) -> None:
    for rank in results:
        expected, found = rank[way, own_loss]
        for e, f in zip(expected, found, strict=True):
            torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-6)


def freed(rank: int) -> str:
    model = tiny()
    fully_shard(model.head)
    fully_shard(model)
    memopt.fuse_loss(model, head="head")
    logits = model(batch(0, rank, 2)[:, :-1])
    try:
        logits.sum()
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_head_sharded_by_itself_is_refused_by_name() -> None:
    for message in run_ranks(freed, 2):
        assert "reshard_after_forward=False" in message
