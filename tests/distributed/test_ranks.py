"""The helper the other tests of this folder stand on."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.distributed.ranks import run_ranks


def total(rank: int, scale: float) -> torch.Tensor:
    value = torch.tensor(scale * (rank + 1))
    dist.all_reduce(value)
    return value


def fail_on_one(rank: int) -> None:
    if rank == 1:
        raise ArithmeticError("on purpose")


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_a_group(world_size: int) -> None:
    expected = 2.0 * sum(range(1, world_size + 1))
    assert [value.item() for value in run_ranks(total, world_size, 2.0)] == [expected] * world_size


def test_a_failing_rank_says_where() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)rank 1:.*fail_on_one.*on purpose"):
        run_ranks(fail_on_one, 2)
    assert len(run_ranks(total, 2, 1.0)) == 2
