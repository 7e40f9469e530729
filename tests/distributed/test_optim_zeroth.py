"""ZerothOrder with several ranks: one number exchanged per direction keeps replicas and shards together."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from memopt.optim import AdamW8bit, ZerothOrder
from tests.closeness import InDouble, check_as_exact
from tests.distributed.ranks import run_ranks
from tests.distributed.training import VOCABULARY, assert_bitwise, loss_of, made, whole


def trained(
    rank: int, wrapper: str, rule: Any, options: dict[str, Any], dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Tensor], int]:
    module, model = made(wrapper, dtype)
    group = dist.group.WORLD if dist.is_initialized() else None
    optimizer = ZerothOrder(model, rule, lr=1e-3, process_group=group, **options)
    sent = 0
    reduce = dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal sent
        sent += tensor.numel()
        return reduce(tensor, *args, **kwargs)

    dist.all_reduce = counted
    try:
        for step in range(4):
            optimizer.step(lambda step=step: loss_of(module, step))
    finally:
        dist.all_reduce = reduce
    return whole(model), sent


@pytest.mark.parametrize("rule", ["sgd", AdamW8bit], ids=str)
@pytest.mark.parametrize("samples", [1, 3])
def test_replicas_stay_bitwise_together_on_one_number_a_direction(rule: Any, samples: int) -> None:
    options = {"samples": samples, "eps": 1e-2}
    (one, sent), (two, _) = run_ranks(trained, 2, "plain", rule, options)
    assert sent == 4 * samples
    assert_bitwise(one, two)
    if rule == "sgd":
        plain, _ = trained(0, "plain", rule, options)
        with InDouble():
            truth, _ = trained(0, "plain", rule, options, torch.float64)
        # The error of a slope is that of its losses over 2 eps, shared by all parameters: the runs compare so many
        # independent errors as slopes, whose ratio chance moves as ``ratio_limit`` tells of rows.
        check_as_exact(one, plain, truth, luck=math.exp(4 * 0.5 * math.sqrt(2 / (4 * samples))))


def test_shards_train_together() -> None:
    (one, _), (two, _) = run_ranks(trained, 2, "fsdp", "sgd", {"eps": 1e-2})
    assert_bitwise(one, two)
    start = whole(made("plain")[1])
    assert all(not torch.equal(one[name], start[name]) for name in start)


EPS = 1e-3


def slope(rank: int) -> tuple[float, float]:
    """The slope measured on sharded parameters, and the true one along the same direction."""
    module, model = made("fsdp")
    optimizer = ZerothOrder(model, eps=EPS, process_group=dist.group.WORLD)
    params = list(model.parameters())
    with torch.no_grad():
        _, (measured,) = optimizer._measure(lambda: loss_of(module, 0), params)
    optimizer._reshard()
    loss_of(module, 0).backward()
    true = torch.zeros(())
    for p in params:
        z = torch.cat([z.flatten() for _, z in optimizer._directions().of(p, 0)])
        true += (p.grad.to_local().flatten() * z).sum()
    both = torch.tensor([measured / dist.get_world_size(), true])
    dist.all_reduce(both)
    return both[0].item(), both[1].item()


def test_the_slope_under_fsdp_is_that_of_the_perturbed_parameters() -> None:
    """FSDP2 keeps gathered parameters after a forward pass; measuring on those would give 0 or nonsense."""
    measured, true = run_ranks(slope, 2)[0]
    # Two losses of about log(VOCABULARY), each to four roundings of float32, over 2 eps; the third derivative's share
    # is of the order of eps**2, far below.
    rounding = 2 * 4 * 2.0**-24 * math.log(VOCABULARY) / (2 * EPS)
    assert abs(measured - true) <= rounding < abs(true) / 10


def unsaid(rank: int) -> str:
    try:
        ZerothOrder(made("plain")[1])
    except ValueError as error:
        return str(error)
    return ""


def test_several_ranks_must_say_what_is_averaged() -> None:
    assert all("process_group=" in text for text in run_ranks(unsaid, 2))
