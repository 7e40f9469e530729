"""DeepSpeed with memopt's optimizers as client optimizer: ZeRO 1, 2 and 3 on two gloo ranks, checkpoints included."""

from __future__ import annotations

import os
import socket
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from memopt.optim import AdamW
from tests.distributed.ranks import run_ranks
from tests.distributed.training import batch, loss_of, made

pytest.importorskip("deepspeed", reason="the deepspeed extra is not installed")

STAGES = (1, 2, 3)
FORMATS = ("fp32", "8bit")
SAVED, STEPS = 2, 4


def engine(stage: int, state: str) -> tuple[Any, AdamW]:
    import deepspeed

    _, model = made("plain")
    optimizer = AdamW(model.parameters(), lr=1e-3, state=state)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0], optimizer


def train(module: Any, steps: range) -> list[float]:
    losses = []
    for step in steps:
        loss = loss_of(module, step)
        module.backward(loss)
        module.step()
        losses.append(loss.item())
    return losses


def everything(rank: int, folder: str, port: int) -> dict[tuple[int, str], dict[str, Any]]:
    """All cases in one pair of processes: DeepSpeed takes seconds to import and keeps its process groups."""
    os.environ.update(DS_ACCELERATOR="cpu", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_SIZE="2")
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    results = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DeepSpeed's own
        for stage in STAGES:
            for state in FORMATS:
                module, optimizer = engine(stage, state)
                losses = train(module, range(SAVED))
                module.save_checkpoint(f"{folder}/{stage}{state}", tag="here")
                losses += train(module, range(SAVED, STEPS))
                again, _ = engine(stage, state)
                again.load_checkpoint(f"{folder}/{stage}{state}", tag="here")
                resumed = train(again, range(SAVED, STEPS))
                results[stage, state] = {"losses": losses, "resumed": resumed, "bytes": optimizer.state_bytes()}
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[int, str], dict[str, Any]]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return run_ranks(everything, 2, str(tmp_path_factory.mktemp("deepspeed")), port, fresh=True)


def reference() -> list[list[float]]:
    """Each rank's losses when one process sees all data, with torch's own AdamW."""
    _, model = made("plain")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    seen: list[list[float]] = [[], []]
    for step in range(STEPS):
        for rank in range(2):
            tokens = batch(step, rank, 2)
            loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            (loss / 2).backward()
            seen[rank].append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return seen


@pytest.mark.parametrize("stage", STAGES)
def test_fp32_states_give_torchs_losses(results: Any, stage: int) -> None:
    for got, expected in zip(results, reference(), strict=True):
        assert got[stage, "fp32"]["losses"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_8bit_states_follow_and_are_small(results: Any, stage: int) -> None:
    numel = sum(p.numel() for p in made("plain")[1].parameters())
    for got in results:
        one = got[stage, "8bit"]
        assert one["losses"] == pytest.approx(got[stage, "fp32"]["losses"], rel=1e-3)
        assert one["bytes"] <= 2.04 * (numel / 2 + 2)


@pytest.mark.parametrize("state", FORMATS)
@pytest.mark.parametrize("stage", STAGES)
def test_checkpoints_resume_bitwise(results: Any, stage: int, state: str) -> None:
    for got in results:
        assert got[stage, state]["resumed"] == got[stage, state]["losses"][SAVED:]
