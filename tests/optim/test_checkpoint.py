"""State dicts: what they carry, torch's own, and what is refused without a trace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from memopt.optim import AdamW, AdamW8bit
from tests.optim.training import assert_same_state, copies, largest_difference, parameters, run, through_file

SHAPES = [(64, 300), (10,)]


def test_state_dicts_hold_plain_tensors_and_say_what_they_are() -> None:
    optimizer = AdamW8bit(parameters(SHAPES), seed=3)
    run(optimizer, 2)
    saved = optimizer.state_dict()
    group = saved["param_groups"][0]
    assert (group["rule"], group["state"], group["version"], group["seed"]) == ("adamw", "8bit", 1, 3)
    for stored in saved["state"].values():
        assert all(type(value) is torch.Tensor for value in stored.values())
    assert saved["state"][0]["shape"].tolist() == [64, 300]
    through_file(saved)


def test_torchs_32_bit_state_loads_into_every_format() -> None:
    params = parameters(SHAPES)
    theirs = torch.optim.AdamW(params, lr=3e-3, betas=(0.8, 0.99))
    run(theirs, 3)
    for state in ("fp32", "bf16", "8bit"):
        ours = copies(params)
        optimizer = AdamW(ours, state=state)
        optimizer.load_state_dict(through_file(theirs.state_dict()))
        group = optimizer.param_groups[0]
        assert (group["lr"], group["betas"], group["state"]) == (3e-3, (0.8, 0.99), state)
        assert "fused" not in group
        assert optimizer.state[ours[0]]["step"] == 3
        reference = copies(params)
        follow = torch.optim.AdamW(reference)
        follow.load_state_dict(through_file(theirs.state_dict()))
        run(follow, [3])
        run(optimizer, [3])
        assert largest_difference(ours, reference) <= {"fp32": 1e-6, "bf16": 2e-4, "8bit": 3e-3}[state]


def test_a_state_dict_from_before_the_first_step_loads() -> None:
    optimizer = AdamW8bit(parameters(SHAPES))
    optimizer.load_state_dict(AdamW8bit(parameters(SHAPES)).state_dict())
    assert not optimizer.state
    run(optimizer, 1)


def _spoil(saved: dict[str, Any], path: tuple[Any, ...], value: Any) -> None:
    for step in path[:-1]:
        saved = saved[step]
    if value is None:
        del saved[path[-1]]
    else:
        saved[path[-1]] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("param_groups", 0, "rule"), "lion", "it is of rule 'lion', this optimizer is 'adamw'"),
        (("param_groups", 0, "version"), 99, "version 99, this memopt reads up to 1"),
        (("param_groups", 0, "state"), "bf16", "its format is 'bf16', this optimizer's '8bit' .*convert"),
        (("param_groups", 0, "lr"), -1.0, "lr is -1.0"),
        (("param_groups", 0, "params"), [0], r"groups of \[1\] parameters, this optimizer of \[2\]"),
        (("state", 0, "exp_avg_codes"), torch.zeros(3, dtype=torch.uint8), r"parameter 0: exp_avg_codes is .*\(3,\)"),
        (("state", 0, "exp_avg_codes"), torch.zeros(64, 300), "exp_avg_codes is torch.float32"),
        (("state", 0, "exp_avg_scales"), None, "parameter 0: it has no exp_avg_scales"),
        (("state", 0, "exp_avg_slow"), torch.zeros(3), "holds exp_avg_slow, which this optimizer does not keep"),
        (("state", 1, "exp_avg"), torch.zeros(3), r"parameter 1: exp_avg is torch.float32 of shape \(3,\)"),
        (("state",), None, "the state dict has no 'state'"),
        (("param_groups", 0, "version"), None, "version None"),
        (("param_groups", 0, "params"), None, "no list of groups with 'params'"),
        (("param_groups", 0, "params"), [5, 6], "states of 0, which is in none of its groups"),
        (("state", 0), [1], "no mapping of parameters to their states"),
        (("state", 0, "step"), torch.tensor(torch.nan), "its step is"),
        (("state", 0, "shape"), torch.tensor([300, 64]), r"it is of shape \(300, 64\), this parameter of \(64, 300\)"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(path: tuple[Any, ...], value: Any, message: str) -> None:
    other = AdamW8bit(parameters(SHAPES), lr=0.5)
    run(other, 2)
    saved = copy.deepcopy(other.state_dict())
    _spoil(saved, path, value)
    optimizer = AdamW8bit(parameters(SHAPES))
    run(optimizer, 1)
    untouched = copy.deepcopy(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert_same_state(optimizer, untouched)
    assert optimizer.param_groups[0]["lr"] == untouched.param_groups[0]["lr"]
    run(optimizer, [1])
    run(untouched, [1])
    assert_same_state(optimizer, untouched)


def test_loading_copies() -> None:
    first = AdamW8bit(parameters(SHAPES))
    run(first, 1)
    second = AdamW8bit(parameters(SHAPES))
    second.load_state_dict(first.state_dict())
    before = copy.deepcopy(first)
    run(second, [1])
    assert_same_state(first, before)
