"""release_gradients with several ranks: bitwise the ordinary step under the same wrapper, with gradients averaged."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from memopt.optim import AdamW, AdamW8bit, release_gradients
from tests.distributed.ranks import run_ranks
from tests.distributed.training import assert_bitwise, loss_of, made, run, whole


def ordinary(rank: int, kind: str, micro: int) -> dict[str, Tensor]:
    module, model = made(kind)
    optimizer = AdamW8bit(model.parameters(), lr=1e-2)
    for step in range(0, 4 * micro, micro):
        for index in range(micro):
            if kind == "ddp":
                module.require_backward_grad_sync = index == micro - 1
            loss_of(module, step + index).backward()
        optimizer.step()
        optimizer.zero_grad()
    return whole(model)


def released(rank: int, kind: str, micro: int) -> tuple[dict[str, Tensor], int]:
    module, model = made(kind)
    optimizer = AdamW8bit(model.parameters(), lr=1e-2)
    handle = release_gradients(optimizer, data_parallel=module if kind == "ddp" else None)
    left = 0
    for step in range(0, 4 * micro, micro):
        with handle.accumulate():
            for index in range(micro - 1):
                loss_of(module, step + index).backward()
        loss_of(module, step + micro - 1).backward()
        left += sum(p.grad is not None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    return whole(model), left


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_wrapped_models_are_updated_as_by_the_ordinary_step(kind: str, micro: int) -> None:
    expected = run_ranks(ordinary, 2, kind, micro)
    for (got, left), plain in zip(run_ranks(released, 2, kind, micro), expected, strict=True):
        assert left == 0
        assert_bitwise(got, plain)


def by_group(rank: int) -> tuple[dict[str, Tensor], int]:
    module, model = made("plain")
    params = list(model.parameters())
    most = 0

    def count(param: Tensor) -> None:
        nonlocal most
        most = max(most, sum(p.grad is not None for p in params))

    for p in params:
        p.register_post_accumulate_grad_hook(count)
    optimizer = AdamW(params, lr=1e-2, state="fp32")
    release_gradients(optimizer, data_parallel=dist.group.WORLD)
    run(module, optimizer, range(4))
    return whole(model), most


def with_ddp(rank: int) -> dict[str, Tensor]:
    module, model = made("ddp")
    run(module, AdamW(model.parameters(), lr=1e-2, state="fp32"), range(4))
    return whole(model)


def test_a_process_group_averages_without_a_wrapper() -> None:
    """Two ranks sum exactly, so the averages are those of DistributedDataParallel."""
    (one, most), (two, _) = run_ranks(by_group, 2)
    assert most == 1
    assert_bitwise(one, two)
    assert_bitwise(one, run_ranks(with_ddp, 2)[0])


def removed(rank: int) -> dict[str, Tensor]:
    module, model = made("ddp")
    optimizer = AdamW(model.parameters(), lr=1e-2, state="fp32")
    with release_gradients(optimizer, data_parallel=module):
        run(module, optimizer, range(2))
    run(module, optimizer, range(2, 4))
    return whole(model)


def test_after_remove_the_wrapper_averages_as_before() -> None:
    assert_bitwise(run_ranks(removed, 2)[0], run_ranks(with_ddp, 2)[0])


def unsaid(rank: int) -> str:
    _, model = made("plain")
    try:
        release_gradients(AdamW8bit(model.parameters()))
    except ValueError as error:
        return str(error)
    return ""


def alone(rank: int) -> bool:
    _, model = made("plain")
    release_gradients(AdamW8bit(model.parameters()), data_parallel=False)
    loss_of(model, 0).backward()
    return not torch.equal(model.head.weight, made("plain")[1].head.weight)


def test_several_ranks_must_say_how_gradients_are_averaged() -> None:
    assert all("say how gradients are averaged" in text for text in run_ranks(unsaid, 2))
    assert run_ranks(alone, 2) == [True, True]
