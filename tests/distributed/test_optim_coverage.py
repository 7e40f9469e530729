"""The coverages with several ranks: block switching, splitting and low rank under DDP, FSDP2 and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor

from memopt.optim import AdamW, BlockCoordinate, LowRankDCT, Split
from tests.closeness import InDouble, check_as_exact
from tests.distributed.ranks import run_ranks
from tests.distributed.training import assert_bitwise, made, run, whole
from tests.kernels.loss_cases import error

OPTIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "blocks": (BlockCoordinate, {"switch_every": 2, "order": "random"}),
    "greedy": (BlockCoordinate, {"switch_every": 2, "order": "greedy"}),
    "split blocks": (Split, {"density": 0.4, "switch_every": 3}),
    "split columns": (Split, {"density": 0.4, "switch_every": 3, "by": "columns"}),
    # Some coefficients are enough for states of few bits, in blocks that ranks share.
    "low rank": (LowRankDCT, {"rank": 30, "switch_every": 3, "side": "columns"}),
}


def build(model: nn.Module, name: str, base: Any, **more: Any) -> Any:
    kind, options = OPTIONS[name]
    return kind(model, base, **{"lr": 1e-2, **options, **more})


def trained(rank: int, wrapper: str, name: str, shares: int = 1) -> tuple[dict[str, Tensor], list[int]]:
    """Parameters after eight steps, and the blocks in the order of their visits."""
    module, model = made(wrapper, **({"find_unused_parameters": True} if wrapper == "ddp" else {}))
    more: dict[str, Any] = {"process_group": dist.group.WORLD} if wrapper == "group" else {}
    # What an update makes of gradients near zero must not hang on their last bits: they differ with the order of sums.
    more["eps"] = 1e-4
    if name.startswith("split"):
        more["rest"] = "sgd"
    optimizer = build(model, name, torch.optim.AdamW, **more)
    visited: list[int] = []

    def note(step: int) -> None:
        if isinstance(optimizer, BlockCoordinate):
            visited.append(optimizer.blocks.index(optimizer.active_block))

    run(module, optimizer, range(8), note, shares)
    return whole(model), visited


def check_follows_one_rank(answers: list[tuple[dict[str, Tensor], list[int]]], name: str) -> None:
    """No further from one rank's run than that is from a run on one rank that adds up two ranks' sums."""
    expected, visits = trained(0, "plain", name)
    in_shares, _ = trained(0, "plain", name, shares=2)
    for got, visited in answers:
        assert visited == visits
        check_as_exact(got, in_shares, {key: value.double() for key, value in expected.items()})


@pytest.mark.parametrize("name", OPTIONS)
def test_fsdp_follows_the_run_on_one_rank(name: str) -> None:
    check_follows_one_rank(run_ranks(trained, 2, "fsdp", name), name)


@pytest.mark.parametrize("wrapper", ["ddp", "group"])
@pytest.mark.parametrize("name", ["blocks", "greedy"])
def test_block_coordinate_with_replicas_follows_the_run_on_one_rank(name: str, wrapper: str) -> None:
    answers = run_ranks(trained, 2, wrapper, name)
    check_follows_one_rank(answers, name)
    assert_bitwise(answers[0][0], answers[1][0])


def in_bf16(rank: int, wrapper: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Trained from weights that bfloat16 can hold, in ``dtype``."""
    module, model = made(wrapper, torch.bfloat16)
    if dtype != torch.bfloat16:
        model.to(dtype)
    run(module, build(model, "blocks", torch.optim.AdamW), range(6))
    return whole(model)


def test_bf16_masters_under_fsdp() -> None:
    plain = in_bf16(0, "plain", torch.bfloat16)
    with InDouble():
        truth = in_bf16(0, "plain", torch.float64)
    for got in run_ranks(in_bf16, 2, "fsdp", torch.bfloat16):
        check_as_exact(got, plain, truth)


def give(model: nn.Module, step: int) -> None:
    """The same gradient on every number of ranks."""
    for number, p in enumerate(model.parameters()):
        if p.requires_grad:
            g = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + number)).to(p.dtype)
            p.grad = distribute_tensor(g, p.device_mesh, p.placements) if isinstance(p, DTensor) else g


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> dict[str, Tensor]:
    for step in steps:
        give(model, step)
        optimizer.step()
        optimizer.zero_grad()
    return whole(model)


def given(rank: int, wrapper: str, name: str, state: str, dtype: torch.dtype) -> dict[str, Tensor]:
    _, model = made(wrapper, dtype)
    return advance(model, build(model, name, AdamW, state=state), range(6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("state", ["fp32", "8bit", "4bit"])
@pytest.mark.parametrize("name", ["blocks", "split blocks", "split columns"])
def test_sharded_is_bitwise_the_unsharded(name: str, state: str, dtype: torch.dtype) -> None:
    expected = given(0, "plain", name, state, dtype)
    for got in run_ranks(given, 2, "fsdp", name, state, dtype):
        assert_bitwise(got, expected)


def save(rank: int, folder: str, name: str, base: str, dtype: torch.dtype, at: int) -> None:
    _, model = made("fsdp" if dist.get_world_size() > 1 else "plain", dtype)
    optimizer = build(model, name, base)
    advance(model, optimizer, range(at))
    before = optimizer.position
    stored = {"model": dict(model.named_parameters()), "optimizer": get_optimizer_state_dict(model, optimizer)}
    assert optimizer.position == before
    dcp.save({**stored, "position": before}, checkpoint_id=folder)


def resume(rank: int, folder: str, name: str, base: str, dtype: torch.dtype, at: int) -> dict[str, Tensor]:
    _, model = made("fsdp" if dist.get_world_size() > 1 else "plain", dtype)
    optimizer = build(model, name, base, lr=1.0)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    position = {"position": ""}
    dcp.load(position, checkpoint_id=folder)
    optimizer.seek(position["position"])
    stored = {
        "model": {name: p.detach() for name, p in model.named_parameters()},
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    dcp.load(stored, checkpoint_id=folder)
    set_optimizer_state_dict(model, optimizer, stored["optimizer"])
    return advance(model, optimizer, range(at, 10))


CONTINUED = [
    ("blocks", "adamw8bit", torch.bfloat16),
    ("greedy", "adamw4bit", torch.float32),
    ("split blocks", "lion8bit", torch.bfloat16),
    ("split columns", "adamw8bit", torch.float32),
    ("low rank", "adamw8bit", torch.float32),
]


def check_low_rank(got: dict[str, Tensor], expected: dict[str, Tensor], in_codes: set[str]) -> None:
    """Up to the roundings of ten steps.

    Sums over ranks and matrix products of parts round differently, but an update far below its parameter hardly shows
    it: what does is that each step rounds every parameter once, in both runs. Where states have few bits, a code may
    come out as its neighbour, which a coefficient shows from then on, and its row with it: by less than its whole way.
    """
    for key, value in expected.items():
        rows = zip(got[key], value.double(), strict=True) if key in in_codes else [(got[key], value.double())]
        errors = [(error(one, other), float(other.norm())) for one, other in rows]
        apart = [size * norm for size, norm in errors if size > 10 * torch.finfo(value.dtype).eps]
        assert len(apart) <= len(errors) // 20, key
        assert all(distance < 10 * 1e-2 for distance in apart), key


@pytest.mark.parametrize(("before", "after", "at"), [(2, 2, 3), (2, 3, 4), (2, 1, 5), (3, 1, 5), (1, 2, 5)])
@pytest.mark.parametrize(("name", "base", "dtype"), CONTINUED, ids=str)
def test_checkpoints_continue_the_cycle_on_another_number_of_ranks(
    name: str, base: str, dtype: torch.dtype, before: int, after: int, at: int, tmp_path: Path
) -> None:
    """Visits last 2 or 3 steps: after 3, 4 and 5 steps of each some are in the middle of one and some between two."""
    run_ranks(save, before, str(tmp_path), name, base, dtype, at)
    _, model = made("plain", dtype)
    optimizer = build(model, name, base)
    expected = advance(model, optimizer, range(10))
    for got in run_ranks(resume, after, str(tmp_path), name, base, dtype, at):
        if name == "low rank":
            names = {id(p): key for key, p in model.named_parameters()}
            states = {names[id(seat.param)]: optimizer.inner.state[seat.stand_in] for seat in optimizer._occupied}
            in_codes = {key for key, state in states.items() if "exp_avg_codes" in state}
            assert in_codes == {f"layers.{layer}.up.weight" for layer in range(3)}
            check_low_rank(got, expected, in_codes)
        else:
            assert_bitwise(got, expected)
