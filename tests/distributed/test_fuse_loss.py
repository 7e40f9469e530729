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
from tests.closeness import InDouble, check_as_exact
from tests.distributed.ranks import run_ranks
from tests.distributed.training import batch, made
from tests.optim.coverage_models import tiny

WAYS = ("ddp", "ddp static", "ddp unused", "fsdp root", "fsdp inside", "fsdp head")
# FSDP2 hooks what a sharded module returns, and DDP searches it: logits that come out so are made after all.
LAZY = [("ddp", False), ("ddp", True), ("ddp static", False), ("ddp static", True), ("ddp unused", False)]
LAZY += [("fsdp root", False)]


class WithLoss(nn.Module):
    """The loss inside the model, as transformers has it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(tokens[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()), logits


def wrapped(way: str, fused: bool) -> nn.Module:
    model = WithLoss(made("fsdp")[1] if way == "fsdp inside" else tiny())
    if way == "fsdp root":
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    if way == "fsdp head":
        fully_shard(model.model.head, reshard_after_forward=False)
        fully_shard(model)
    if fused:
        memopt.fuse_loss(model, head="model.head", chunk_bytes=1024)
    if way.startswith("ddp"):
        options = {"ddp static": {"static_graph": True}, "ddp unused": {"find_unused_parameters": True}}
        return nn.parallel.DistributedDataParallel(model, **options.get(way, {}))
    return model


def gradients(rank: int, way: str, fused: bool, own_loss: bool) -> tuple[dict[str, Tensor], bool]:
    """The second step's gradients, and whether the logits have been made."""
    module = wrapped(way, fused)
    for step in range(2):
        module.zero_grad(set_to_none=True)
        tokens = batch(step, rank, 2)
        loss, logits = module(tokens)
        assert isinstance(logits, LazyLogits) == fused
        if own_loss:
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
    found = {}
    for name, p in module.named_parameters():
        assert p.grad is not None
        found[name.removeprefix("module.")] = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
    return found, not fused or logits.is_computed


def work(rank: int) -> dict[Any, list[tuple[dict[str, Tensor], bool]]]:
    return {
        (way, own): [gradients(rank, way, fused, own) for fused in (False, True)]
        for way in WAYS
        for own in (False, True)
    }


@pytest.fixture(scope="module")
def results() -> list[dict[Any, list[tuple[dict[str, Tensor], bool]]]]:
    return run_ranks(work, 2)


@pytest.fixture(scope="module")
def truth() -> dict[str, Tensor]:
    """Of one process that sees both ranks' tokens, in float64."""
    model = WithLoss(tiny(torch.float64))
    with InDouble():
        losses = [model(batch(1, rank, 2))[0] for rank in range(2)]
        (sum(losses) / 2).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("own_loss", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_as_exact_as_the_stock_model_s(
    results: Any, truth: dict[str, Tensor], way: str, own_loss: bool
) -> None:
    for rank in results:
        (plain, _), (found, made_logits) = rank[way, own_loss]
        check_as_exact(found, plain, truth)
        assert made_logits == ((way, own_loss) not in LAZY)


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
