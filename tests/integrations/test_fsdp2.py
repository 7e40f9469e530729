"""FSDP2 on two gloo ranks, end to end on real text: AdamW8bit, a plan, asynchronous checkpoints."""

from __future__ import annotations

import statistics
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import memopt
from memopt.integrations.checkpoints import Checkpoints
from memopt.optim import AdamW8bit
from tests.closeness import check_losses_as_exact
from tests.distributed.ranks import run_ranks
from tests.distributed.training import whole
from tests.integrations import real_text

SAVED, STEPS = 4, 8
METERED = 3  # a metered step takes several times as long; the first allocates the states, the others are alike
SHARE = 0.65  # of the step's peak


def built(plan: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = real_text.model()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    memopt.apply(model, plan)
    return model, AdamW8bit(model.parameters(), lr=real_text.LR)


def train(rank: int, model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> tuple[list[float], int]:
    """Losses, and the largest metered peak of these steps."""
    losses, peak_bytes = [], 0
    for step, inputs in zip(steps, real_text.data(steps, rank), strict=True):
        with memopt.meter(model, optimizer) if step < METERED else nullcontext() as meter:
            loss = model(*inputs)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        peak_bytes = max(peak_bytes, meter.peak_bytes if meter else 0)
    return losses, peak_bytes


def saved_and_resumed(rank: int, folder: str, plan: Any) -> dict[str, Any]:
    model, optimizer = built(plan)
    checkpoints = Checkpoints(folder)
    losses, peak_bytes = train(rank, model, optimizer, range(SAVED))
    checkpoints.save(SAVED, model, optimizer, extra={"rank": rank})
    at_save = whole(model)
    more, _ = train(rank, model, optimizer, range(SAVED, STEPS))
    again, restored = built(plan)
    loaded = checkpoints.load(again, restored)
    resumed, _ = train(rank, again, restored, range(SAVED, STEPS))
    same = all(torch.equal(a, b) for a, b in zip(whole(model).values(), whole(again).values(), strict=True))
    checkpoints.close()
    return {
        "losses": losses + more,
        "resumed": resumed,
        "same": same,
        "extra": loaded.extra,
        "peak_bytes": peak_bytes,
        "at_save": at_save,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fsdp2")


@pytest.fixture(scope="module")
def plan() -> Any:
    return real_text.planned(zero=3, budget_bytes=SHARE)


@pytest.fixture(scope="module")
def results(folder: Path, plan: Any) -> list[dict[str, Any]]:
    return run_ranks(saved_and_resumed, 2, str(folder), plan[0])


def test_the_loss_is_that_of_plain_pytorch_within_one_percent(results: list[dict[str, Any]]) -> None:
    ours = [statistics.fmean(pair) for pair in zip(*(one["losses"] for one in results), strict=True)]
    expected = real_text.reference(STEPS)
    assert ours == pytest.approx(expected, rel=real_text.WITHIN)
    assert expected[-1] < 0.9 * expected[0]


def test_the_metered_peak_of_each_rank_is_under_the_budget(results: list[dict[str, Any]], plan: Any) -> None:
    chosen, budget_bytes = plan
    assert chosen.status in ("optimal", "feasible")
    assert chosen.peak_bytes <= budget_bytes
    for one in results:
        assert one["peak_bytes"] <= budget_bytes


def test_the_meter_sees_memory_that_a_living_storage_gives_back() -> None:
    """FSDP2 frees gathered parameters by resizing their storages to nothing."""
    kept = torch.empty(1000)
    with memopt.meter(model=[], optimizer=[]) as meter:
        kept.add_(1)
        kept.untyped_storage().resize_(0)
        torch.empty(500).add_(1)
        kept.untyped_storage().resize_(4000)
        kept.add_(1)
    assert meter.peak_bytes == 4000
    assert torch.UntypedStorage.resize_.__qualname__ != "Tracker._watch_resizes.<locals>.resized"


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(results: list[dict[str, Any]]) -> None:
    for rank, one in enumerate(results):
        assert one["same"]
        assert one["resumed"] == one["losses"][SAVED:]
        assert one["extra"] == {"rank": rank}


def test_the_file_holds_the_whole_weights(results: list[dict[str, Any]], folder: Path) -> None:
    read = load_file(folder / f"step-{SAVED:09d}" / "model.safetensors")
    assert read.keys() == results[0]["at_save"].keys()
    for name, value in results[0]["at_save"].items():
        assert torch.equal(read[name], value), name


def on_other_ranks(rank: int, folder: str, sharded: bool) -> tuple[dict[str, Tensor], float]:
    model = real_text.model()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    if sharded:
        fully_shard(model)
    optimizer = AdamW8bit(model.parameters(), lr=real_text.LR)
    checkpoints = Checkpoints(folder)
    checkpoints.load(model, optimizer)
    checkpoints.close()
    loaded = whole(model)
    return loaded, train(0, model, optimizer, range(SAVED, SAVED + 1))[0][0]


def test_one_process_or_three_ranks_can_go_on(results: list[dict[str, Any]], folder: Path) -> None:
    alone, loss = on_other_ranks(0, str(folder), False)
    three = run_ranks(on_other_ranks, 3, str(folder), True)
    for name, value in results[0]["at_save"].items():
        assert torch.equal(alone[name], value), name
        assert torch.equal(three[2][0][name], value), name
    # The first rank's share of the same step: the same forward pass, but for sums split over other threads.
    expected = results[0]["losses"][SAVED]
    check_losses_as_exact([loss], [expected], [expected])
