"""FSDP2 and DDP: a sharded run is bitwise the unsharded one, and checkpoints move between numbers of ranks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import memopt.optim
from memopt.optim.formats import names
from tests.distributed.ranks import run_ranks
from tests.distributed.training import assert_bitwise
from tests.kernels.loss_cases import error

STATES = names()
# Sums in another order move an update by less than a parameter's last place; each step may round it to another value.
ROUNDING = torch.finfo(torch.float32).eps


def shapes() -> dict[str, tuple[int, ...]]:
    """Rows that two and three ranks cannot share evenly, rows of many lengths, and parameters of one dimension."""
    return {
        "wide": (17, 600),
        "blocks": (7, 1024),
        "one_row": (1, 5000),
        "bias": (601,),
        "scalar": (1,),
        "conv": (11, 33, 3, 3),
        "long_bias": (9001,),
        "short_rows": (300, 50),
        "even_bias": (12288,),
        "even_short_rows": (192, 64),
        "matrix": (259, 300),
    }


class Bag(nn.Module):
    """Parameters alone; gradients are given from outside so that every number of ranks sees the same ones."""

    def __init__(self, chosen: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        for name, shape in chosen.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))

    def forward(self) -> Tensor:
        return sum(p.float().sum() for p in self.parameters())


def gradient(name: str, shape: tuple[int, ...], step: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + len(name))
    return torch.randn(shape, generator=generator).mul_(0.5 + (step % 3)).to(dtype)


def whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def give_gradients(model: nn.Module, step: int) -> None:
    for name, p in model.named_parameters():
        g = gradient(name, tuple(p.shape), step, p.dtype)
        if isinstance(p, DTensor):
            p.grad = distribute_tensor(g, p.device_mesh, p.placements)
        else:
            p.grad = g


def build(
    rule: str, dtype: torch.dtype, options: dict[str, Any], sharded: bool, chosen: dict[str, tuple[int, ...]]
) -> Any:
    model = Bag(chosen, dtype)
    if sharded:
        fully_shard(model)
    return model, getattr(memopt.optim, rule)(model.parameters(), lr=1e-2, **options)


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> dict[str, Tensor]:
    for step in steps:
        give_gradients(model, step)
        optimizer.step()
        optimizer.zero_grad()
    return {name: whole(p.detach()).clone() for name, p in model.named_parameters()}


def sharded_run(
    rank: int, rule: str, dtype: torch.dtype, options: dict[str, Any], chosen: dict[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    return advance(*build(rule, dtype, options, True, chosen), range(4))


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("state", STATES)
def test_adamw_sharded_by_rows_is_bitwise_the_unsharded_one(state: str, dtype: torch.dtype, world_size: int) -> None:
    options = {"state": state, "param_rounding": "stochastic" if dtype is torch.bfloat16 else "nearest"}
    expected = advance(*build("AdamW", dtype, options, False, shapes()), range(4))
    for got in run_ranks(sharded_run, world_size, "AdamW", dtype, options, shapes()):
        assert_bitwise(got, expected)


def checkpoint(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        "model": {name: p.detach() for name, p in model.named_parameters()},
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }


def save(rank: int, folder: str, *made: Any) -> None:
    model, optimizer = build(*made)
    advance(model, optimizer, range(2))
    dcp.save(checkpoint(model, optimizer), checkpoint_id=folder)


def resume(rank: int, folder: str, *made: Any) -> dict[str, Tensor]:
    model, optimizer = build(*made)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    stored = checkpoint(model, optimizer)
    dcp.load(stored, checkpoint_id=folder)
    set_optimizer_state_dict(model, optimizer, stored["optimizer"])
    return advance(model, optimizer, range(2, 5))


ELEMENTWISE = ["Adam", "Lion", "SGD", "RMSprop", "Adagrad", "AdEMAMix"]
MORE = {"SGD": {"momentum": 0.9}, "RMSprop": {"momentum": 0.5}}


@pytest.mark.parametrize("state", ["8bit", "4bit"])
@pytest.mark.parametrize("rule", ELEMENTWISE)
def test_other_elementwise_rules_too(rule: str, state: str) -> None:
    options = {"state": state, **MORE.get(rule, {})}
    expected = advance(*build(rule, torch.float32, options, False, shapes()), range(4))
    for got in run_ranks(sharded_run, 2, rule, torch.float32, options, shapes()):
        assert_bitwise(got, expected)


@pytest.mark.parametrize("rule", ["LAMB", "LARS", "Muon", "NorMuon", "AdamMini"])
def test_rules_over_whole_parameters_agree_up_to_rounding(rule: str) -> None:
    """Their norms, rows and matrices are those of the whole parameter, whose sums ranks add in another order."""
    expected = advance(*build(rule, torch.float32, {"state": "fp32"}, False, shapes()), range(3))
    for got in run_ranks(sharded_steps, 2, rule, {"state": "fp32"}, 3):
        for name, value in expected.items():
            assert error(got[name], value.double()) <= 3 * ROUNDING, name


def sharded_steps(rank: int, rule: str, options: dict[str, Any], steps: int) -> dict[str, Tensor]:
    return advance(*build(rule, torch.float32, options, True, shapes()), range(steps))


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 3), (3, 2), (2, 1), (1, 3)])
@pytest.mark.parametrize("state", STATES)
def test_checkpoints_are_resharded_to_another_number_of_ranks(
    state: str, before: int, after: int, tmp_path: Path
) -> None:
    made = ("AdamW", torch.float32, {"state": state})
    expected = advance(*build(*made, False, shapes()), range(5))
    run_ranks(save, before, str(tmp_path), *made, before > 1, shapes())
    for got in run_ranks(resume, after, str(tmp_path), *made, after > 1, shapes()):
        assert_bitwise(got, expected)


def full_state(rank: int, *made: Any) -> dict[str, Any]:
    model, optimizer = build(*made)
    advance(model, optimizer, range(2))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_optimizer_state_dict(model, optimizer, options=options)


@pytest.mark.parametrize("state", STATES)
def test_the_full_state_dict_is_that_of_the_unsharded_run(state: str) -> None:
    made = ("AdamW", torch.float32, {"state": state})
    got, _ = run_ranks(full_state, 2, *made, True, shapes())
    (expected,) = run_ranks(full_state, 1, *made, False, shapes())
    for name, entry in expected["state"].items():
        for key, value in entry.items():
            assert torch.equal(torch.as_tensor(got["state"][name][key]), torch.as_tensor(value)), (name, key)


def held_bytes(rank: int, *made: Any) -> int:
    model, optimizer = build(*made)
    advance(model, optimizer, range(1))
    return optimizer.state_bytes()


@pytest.mark.parametrize("state", STATES)
def test_ranks_share_the_states_of_rows(state: str) -> None:
    rows = {name: shape for name, shape in shapes().items() if name not in ("long_bias", "short_rows")}
    made = ("AdamW", torch.float32, {"state": state})
    parts = run_ranks(held_bytes, 2, *made, True, rows)
    columns = rows["matrix"][1] * 4 if state == "4bit-paper" else 0  # maxima that every rank needs
    assert sum(parts) == held_bytes(0, *made, False, rows) + columns


def spoiled(rank: int, *made: Any) -> tuple[dict[str, Tensor], int]:
    """One element of one rank's part of one gradient is an infinity in the second step."""
    model, optimizer = build(*made)
    advance(model, optimizer, range(1))
    give_gradients(model, 1)
    wide = dict(model.named_parameters())["wide"].grad
    if rank == 0:
        (wide._local_tensor if isinstance(wide, DTensor) else wide)[0, 0] = float("inf")
    optimizer.step()
    return advance(model, optimizer, range(2, 4)), optimizer.param_groups[0]["skipped_steps"]


def test_all_ranks_skip_a_step_when_one_sees_an_infinity() -> None:
    made = ("AdamW", torch.float32, {"state": "8bit", "skip_nonfinite": True})
    expected, skipped = spoiled(0, *made, False, shapes())
    assert skipped == 1
    for got, count in run_ranks(spoiled, 2, *made, True, shapes()):
        assert count == 1
        assert_bitwise(got, expected)


def kinds(rank: int, state: str, sharded: bool) -> dict[str, list[str]]:
    """Which states each parameter has on this rank, by name."""
    chosen = {"small": (65, 64), "large": (1, 4096), "tiny": (63, 65)}
    model, optimizer = build("AdamW", torch.float32, {"state": state}, sharded, chosen)
    advance(model, optimizer, range(1))
    return {name: sorted(optimizer.state[p]) for name, p in model.named_parameters()}


@pytest.mark.parametrize("state", STATES)
def test_precision_follows_the_whole_parameter(state: str) -> None:
    """A rank that holds few elements of a large parameter, or none, keeps them as the others do."""
    assert run_ranks(kinds, 3, state, True) == [kinds(0, state, False)] * 3


def from_torch(rank: int, state: str, sharded: bool) -> dict[str, Tensor]:
    """Two steps of torch's AdamW, then its states in few bits and two steps more."""
    model, _ = build("AdamW", torch.float32, {}, sharded, shapes())
    plain = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
    advance(model, plain, range(2))
    optimizer = memopt.optim.AdamW(model.parameters(), lr=1e-2, state=state)
    optimizer.load_state_dict(plain.state_dict())
    return advance(model, optimizer, range(2, 4))


@pytest.mark.parametrize("state", ["8bit", "4bit-paper"])
def test_sharded_states_of_torch_are_taken_over(state: str) -> None:
    expected = from_torch(0, state, False)
    for got in run_ranks(from_torch, 2, state, True):
        assert_bitwise(got, expected)


def from_one_rank(rank: int, saved: dict[str, Any], *made: Any) -> dict[str, Tensor]:
    """The whole state dict of an unsharded run, loaded as it is."""
    model, optimizer = build(*made, True, shapes())
    advance(model, optimizer, range(2))
    optimizer.load_state_dict(saved)
    return advance(model, optimizer, range(2, 4))


def test_a_whole_state_dict_loads_into_a_sharded_optimizer() -> None:
    made = ("AdamW", torch.float32, {"state": "4bit-paper"})
    model, optimizer = build(*made, False, shapes())
    advance(model, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    expected = advance(model, optimizer, range(2, 4))
    for got in run_ranks(from_one_rank, 2, saved, *made):
        assert_bitwise(got, expected)


@pytest.mark.parametrize("rule", ["NorMuon", "AdamMini"])
def test_states_of_rows_and_blocks_are_resharded(rule: str, tmp_path: Path) -> None:
    """Their small states: one number a row is sharded with the rows, one for the whole is on every rank."""
    made = (rule, torch.float32, {"state": "8bit"})
    expected = advance(*build(*made, False, shapes()), range(5))
    run_ranks(save, 2, str(tmp_path), *made, True, shapes())
    for got in run_ranks(resume, 3, str(tmp_path), *made, True, shapes()):
        for name, value in expected.items():
            # Ten moments may lie a code further, which moves ten elements by a 127th of the learning rate.
            allowed = 5 * ROUNDING * value.norm() + 10 * 1e-2 / 127
            assert (got[name] - value).norm() <= allowed, name


def head_blocks(rank: int, sharded: bool) -> dict[str, Tensor]:
    """Adam-mini with blocks of 4 rows that ranks cut apart."""
    options = {"state": "fp32", "rows_per_block": 4}
    return advance(
        *build("AdamMini", torch.float32, options, sharded, {"queries": (20, 300), "keys": (12, 8)}), range(4)
    )


@pytest.mark.parametrize("world_size", [2, 3])
def test_blocks_of_several_rows_may_lie_on_several_ranks(world_size: int) -> None:
    expected = head_blocks(0, False)
    for got in run_ranks(head_blocks, world_size, True):
        for name, value in expected.items():
            assert error(got[name], value.double()) <= 4 * ROUNDING, name
