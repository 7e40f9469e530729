"""A small model trained for real on several ranks: plain, wrapped in DDP, or sharded by FSDP2."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests.optim.coverage_models import Tiny, tiny

VOCABULARY = 61


def batch(step: int, rank: int, world_size: int, per_rank: int = 2) -> Tensor:
    """This rank's share of the step's tokens; all shares together are the same for every number of ranks."""
    tokens = torch.randint(0, VOCABULARY, (12, 9), generator=torch.Generator().manual_seed(step))
    return tokens.chunk(world_size)[rank]


def loss_of(model: nn.Module, step: int, share: tuple[int, int] | None = None) -> Tensor:
    """The loss of this rank's share of the step, or of another: ``share`` is a rank and the number of ranks."""
    own = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    rank, world_size = own if share is None else share
    tokens = batch(step, rank, world_size)
    return nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten())


def made(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Module, Tiny]:
    """The module to call and the model inside it."""
    model = tiny(dtype)
    if kind == "fsdp":
        for layer in model.layers:
            fully_shard(layer)
        fully_shard(model)
    return (DistributedDataParallel(model, **options) if kind == "ddp" else model), model


def run(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: Iterable[int],
    after: Callable[[int], None] | None = None,
    shares: int = 1,
) -> None:
    """Train; one rank with several ``shares`` adds up what as many ranks would."""
    for step in steps:
        if shares == 1:
            loss_of(module, step).backward()
        else:
            for n in range(shares):
                (loss_of(module, step, (n, shares)) / shares).backward()
        optimizer.step()
        optimizer.zero_grad()
        if after is not None:
            after(step)


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def assert_bitwise(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
