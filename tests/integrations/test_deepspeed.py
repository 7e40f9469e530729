"""DeepSpeed with memopt's optimizers as client optimizer: ZeRO 1, 2 and 3 on two gloo ranks, checkpoints included.

Ends with ZeRO 3 on real text, and with the example.
"""

from __future__ import annotations

import os
import socket
import statistics
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import memopt
from memopt.offload import apply
from memopt.optim import AdamW
from memopt.planner.values import Action, BlockPlan, StorageAction
from tests.closeness import check_losses_as_exact
from tests.distributed.ranks import run_ranks
from tests.distributed.training import loss_of, made
from tests.integrations import deepspeed_text, real_text
from tests.offload.tiled import Model, by_hand

pytest.importorskip("deepspeed", reason="the deepspeed extra is not installed")

SHARDED = {  # nothing stays gathered, so small as the model is, and DeepSpeed's own buffers are small
    "stage3_param_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": 5000,
    "reduce_bucket_size": 50000,
}
STAGES = (1, 2, 3)
FORMATS = ("fp32", "8bit")
SAVED, STEPS = 2, 4


def engine(stage: int, state: str, model: nn.Module | None = None) -> tuple[Any, Any]:
    """DeepSpeed with memopt's AdamW and these states, or with torch's own for ``"torch"``."""
    import deepspeed

    model = made("plain")[1] if model is None else model
    if state == "torch":
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-3)
    else:
        optimizer = AdamW(model.parameters(), lr=1e-3, state=state)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {**SHARDED, "stage": stage},
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


def plan_of() -> Any:
    """What the layers save is swapped and recomputed by turns."""
    _, model = made("plain")
    paths = [f"layers.{n}" for n in range(len(model.layers))]
    blank = SimpleNamespace(blocks=tuple(BlockPlan(path, 0, "", ()) for path in paths), swap_tier="disk")
    with apply(model, blank) as handle:
        loss_of(model, 0)
        counts = [len(planned._templates[0].saved) for planned in handle.blocks]
    blocks = tuple(
        BlockPlan(path, 0, "", tuple(StorageAction(n, 0, Action.RECOMPUTE if n % 2 else Action.SWAP) for n in range(c)))
        for path, c in zip(paths, counts, strict=True)
    )
    return SimpleNamespace(blocks=blocks, swap_tier="disk")


def under_a_plan(stage: int, plan: Any, early: bool) -> tuple[list[float], int, int]:
    """The losses of the first steps, and how often blocks were replayed, and replayed in whole."""
    if early:  # before DeepSpeed has seen the model
        _, model = made("plain")
        handle = apply(model, plan)
        module = engine(stage, "fp32", model)[0]
    else:
        module, _ = engine(stage, "fp32")
        handle = apply(module.module, plan)
    losses = train(module, range(SAVED))
    handle.remove()
    return losses, handle.counts.replays, handle.counts.whole


def in_tiles(stage: int, planned: bool) -> list[float]:
    """Losses of a model whose MLPs run in tiles, under a plan that recomputes half, or by hand and all kept."""
    torch.manual_seed(0)
    model, x = Model(), torch.randn(2, 64, 64)
    traced = memopt.trace(Model(), (x,), tiles=4)
    weights = sum(p.nbytes for p in model.parameters())
    budget = 2 * weights + (traced.peak_bytes - 2 * weights) // 2
    plan = memopt.plan(traced, budget, "cpu", actions=("recompute",))
    module, _ = engine(stage, "fp32", model)
    losses = []
    with apply(module.module, plan) if planned else by_hand(module.module, x):
        torch.manual_seed(5)
        for _ in range(SAVED):
            loss = module(x)
            module.backward(loss)
            module.step()
            losses.append(loss.item())
    return losses


def everything(rank: int, folder: str, port: int) -> dict[tuple[int, str], dict[str, Any]]:
    """All cases in one pair of processes: DeepSpeed takes seconds to import and keeps its process groups."""
    os.environ.update(DS_ACCELERATOR="cpu", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_SIZE="2")
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    results: dict[Any, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DeepSpeed's own
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled for a minute where it is new
        for stage in STAGES:
            results[stage, "text with and without a plan"] = deepspeed_text.with_and_without(rank, stage)
        results[3, "text"] = deepspeed_text.zero_3(rank, folder)
        deepspeed_text.example(folder)
        plan = plan_of()
        for stage in STAGES:
            for state in FORMATS:
                module, optimizer = engine(stage, state)
                losses = train(module, range(SAVED))
                if state == "8bit":
                    module.save_checkpoint(f"{folder}/{stage}", tag="here")
                losses += train(module, range(SAVED, STEPS))
                results[stage, state] = {"losses": losses, "bytes": optimizer.state_bytes()}
            results[stage, "torch"] = train(engine(stage, "torch")[0], range(STEPS))
            again, _ = engine(stage, "8bit")
            again.load_checkpoint(f"{folder}/{stage}", tag="here")
            results[stage, "resumed"] = train(again, range(SAVED, STEPS))
            results[stage, "tiles"] = [in_tiles(stage, planned) for planned in (False, True)]
            results[stage, "plan"] = under_a_plan(stage, plan, early=False)
        results[3, "early plan"] = under_a_plan(3, plan, early=True)
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[int, str], dict[str, Any]]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return run_ranks(everything, 2, str(tmp_path_factory.mktemp("deepspeed")), port, fresh=True)


@pytest.mark.parametrize("stage", STAGES)
def test_fp32_states_give_torchs_losses(results: Any, stage: int) -> None:
    for got in results:
        check_losses_as_exact(got[stage, "fp32"]["losses"], got[stage, "torch"], got[stage, "torch"])


@pytest.mark.parametrize("stage", STAGES)
def test_8bit_states_follow_and_are_small(results: Any, stage: int) -> None:
    numel = sum(p.numel() for p in made("plain")[1].parameters())
    for got in results:
        one = got[stage, "8bit"]
        # docs/distributed.md promises a tenth of a percent.
        assert one["losses"] == pytest.approx(got[stage, "fp32"]["losses"], rel=1e-3)
        assert one["bytes"] <= 2.04 * (numel / 2 + 2)


@pytest.mark.parametrize("stage", STAGES)
def test_checkpoints_resume_bitwise(results: Any, stage: int) -> None:
    for got in results:
        assert got[stage, "resumed"] == got[stage, "8bit"]["losses"][SAVED:]


@pytest.mark.parametrize(("stage", "when"), [(1, "plan"), (2, "plan"), (3, "plan"), (3, "early plan")])
def test_losses_under_a_plan_are_bitwise_those_without(results: Any, stage: int, when: str) -> None:
    for got in results:
        losses, replays, whole = got[stage, when]
        assert losses == got[stage, "fp32"]["losses"][:SAVED]
        assert replays > 0
        assert whole == 0


@pytest.mark.parametrize("stage", STAGES)
def test_a_plan_of_memopt_is_bitwise_and_within_its_budget(results: Any, stage: int) -> None:
    for got in results:
        found = got[stage, "text with and without a plan"]
        plain, plan = found["plain"], found["plan"]
        assert found["status"] in ("optimal", "feasible")
        assert plan["losses"] == plain["losses"]
        assert all(map(torch.equal, plan["parameters"], plain["parameters"]))
        assert plan["peak_bytes"] <= found["budget"] < plain["peak_bytes"]


def test_zero_3_on_real_text_has_the_loss_of_plain_pytorch(results: Any) -> None:
    ours = [statistics.fmean(pair) for pair in zip(*(got[3, "text"]["losses"] for got in results), strict=True)]
    assert ours == pytest.approx(real_text.reference(deepspeed_text.STEPS), rel=real_text.WITHIN)


def test_zero_3_on_real_text_resumes_bitwise(results: Any) -> None:
    for got in results:
        assert got[3, "text"]["resumed"] == got[3, "text"]["losses"][deepspeed_text.SAVED :]


@pytest.mark.parametrize("stage", STAGES)
def test_tiles_of_a_plan_are_bitwise_the_same_tiles_without(results: Any, stage: int) -> None:
    for got in results:
        by_itself, planned = got[stage, "tiles"]
        assert len(planned) == SAVED
        assert planned == by_itself
