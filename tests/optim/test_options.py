"""Groups, learning rates, schedulers, closures, hooks, scaling; and what is refused."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from memopt.optim import AdamW, AdamW8bit, make, optimizers
from memopt.optim.formats import Blockwise, names
from memopt.optim.registry import by_name, rules_by_name
from tests.optim.training import copies, gradients, largest_difference, parameters, run

SHAPE = (64, 300)


def test_format_can_differ_by_group() -> None:
    params = parameters([SHAPE, SHAPE, SHAPE])
    optimizer = AdamW(
        [{"params": params[:1], "state": "fp32"}, {"params": params[1:2]}, {"params": params[2:], "state": "bf16"}]
    )
    run(optimizer, 1)
    assert [group["state"] for group in optimizer.param_groups] == ["fp32", "8bit", "bf16"]
    found = [sorted(k for k in optimizer.state[p] if k != "step") for p in params]
    assert found[0] == found[2] == ["exp_avg", "exp_avg_sq"]
    assert len(found[1]) == 4
    assert optimizer.state[params[2]]["exp_avg"].dtype == torch.bfloat16


def test_lr_may_be_a_float_or_a_tensor_and_schedulers_drive_it() -> None:
    results = []
    for lr in (0.01, torch.tensor(0.01, dtype=torch.float64)):
        params = parameters([SHAPE])
        optimizer = AdamW8bit(params, lr=lr)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)
        for step in range(4):
            gradients(params, step)
            optimizer.step()
            scheduler.step()
        results.append((params[0], float(optimizer.param_groups[0]["lr"])))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == pytest.approx(results[1][1]) != 0.01


def test_closure_is_called_with_gradients_enabled() -> None:
    (param,) = parameters([SHAPE])
    optimizer = AdamW8bit([param])

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    before = float((param.detach() ** 2).sum())
    assert float(optimizer.step(closure).detach()) == pytest.approx(before)
    assert float((param.detach() ** 2).sum()) < before


@pytest.mark.parametrize("state", ["8bit", "4bit"])
def test_nan_reaches_no_other_element(state: str) -> None:
    (param,) = parameters([(4, 1024)])
    (clean,) = parameters([(4, 1024)])
    ours, reference = AdamW([param], state=state), AdamW([clean], state=state)
    for optimizer, bad in ((ours, torch.nan), (reference, 0.0)):
        (p,) = optimizer.param_groups[0]["params"]
        for step in range(3):
            gradients([p], step)
            p.grad[1, 300] = 0.0 if step else bad
            optimizer.step()
    same = torch.ones_like(param, dtype=torch.bool)
    same[1, 300] = False
    assert torch.equal(param[same], clean[same])
    assert param[1, 300].isnan()


def test_make_spells_rules_and_formats() -> None:
    params = parameters([SHAPE])
    assert type(make("adamw8bit", params)) is AdamW8bit
    assert type(make("AdamW_8bit", params)) is AdamW8bit
    assert make("adamw", params).defaults["state"] == "fp32"
    assert make("adamw", params, state="bf16").defaults["state"] == "bf16"
    assert make("adamwbf16", params, lr=0.5).defaults["lr"] == 0.5
    with pytest.raises(
        ValueError, match=r"'adamv8bit'; did you mean .*adamw8bit .*rules are .*adamw.*8bit.*, bf16, fp32"
    ):
        make("adamv8bit", params)
    with pytest.raises(TypeError, match="use AdamW to choose"):
        AdamW8bit(params, state="fp32")


def test_every_class_is_offered_and_documented() -> None:
    import memopt.optim as room

    for name, one in optimizers().items():
        assert getattr(room, name) is one
        assert name in room.__all__
        assert one.__doc__
    for rule, one in rules_by_name().items():  # what state dicts say is what ``make`` takes
        assert by_name(rule)[0] is one


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"state": "7bit"}, ValueError, "unknown state format '7bit'; the choices are .*8bit, .*bf16, fp32"),
        ({"state": 8}, TypeError, "lacks name, block"),
        ({"lr": -1.0}, ValueError, "lr is -1.0; it must be a finite number of at least 0"),
        ({"lr": torch.ones(2)}, ValueError, r"lr is a tensor of shape \(2,\)"),
        ({"lr": "fast"}, TypeError, "lr is 'fast'"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] is 1.0"),
        ({"betas": (0.9,)}, ValueError, r"betas is \(0.9,\); it must be 2 numbers"),
        ({"eps": float("nan")}, ValueError, "eps is nan"),
        ({"weight_decay": -1}, ValueError, "weight_decay is -1"),
        ({"param_rounding": "up"}, ValueError, "'up'; it must be one of 'nearest', 'stochastic', 'kahan'"),
        ({"maximize": 1}, TypeError, "maximize is 1; it must be True or False"),
        ({"seed": -1}, ValueError, "seed is -1"),
        ({"wd": 0.1}, TypeError, "wd"),
    ],
)
def test_bad_options_are_refused_and_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AdamW(parameters([SHAPE]), **options)


def test_bad_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match=r"real floating-point parameters .*view_as_real"):
        AdamW([torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64))])
    with pytest.raises(TypeError, match="iterable"):
        AdamW(torch.zeros(3))
    with pytest.raises(ValueError, match="empty parameter list"):
        AdamW([])
    with pytest.raises(ValueError, match="AdamW has no option 'decay' for a parameter group"):
        AdamW([{"params": parameters([SHAPE]), "decay": 0.1}])
    optimizer = AdamW(parameters([SHAPE]))
    with pytest.raises(ValueError, match="eps is -1"):
        optimizer.add_param_group({"params": parameters([SHAPE]), "eps": -1})
    assert len(optimizer.param_groups) == 1


def test_sparse_gradients_are_refused_before_anything_changes() -> None:
    params = parameters([SHAPE, (10, 3)])
    gradients(params, 0)
    params[1].grad = params[1].grad.to_sparse()
    before = copies(params)
    optimizer = AdamW(params)
    with pytest.raises(RuntimeError, match=r"sparse gradient for a parameter of shape \(10, 3\)"):
        optimizer.step()
    assert largest_difference(params, before) == 0
    assert not optimizer.state


def test_a_users_own_format_works_with_every_option() -> None:
    @dataclass(frozen=True)
    class Short(Blockwise):
        """A block of 64."""

    params = parameters([SHAPE])
    optimizer = AdamW(params, state=Short("8bit-short", signed="sq127", unsigned="root4", block=64))
    run(optimizer, 2)
    assert optimizer.state[params[0]]["exp_avg_scales"].shape == (64, 4)
    assert "8bit-short" in names()
    with pytest.raises(ValueError, match="different state format is already called '8bit'"):
        AdamW(params, state=Short("8bit", signed="sq127", unsigned="root4", block=64))


def test_named_parameters_are_taken() -> None:
    with warnings.catch_warnings():
        optimizer = AdamW8bit(torch.nn.Linear(80, 80).named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    other = AdamW8bit(torch.nn.Linear(80, 80).named_parameters())
    other.load_state_dict(optimizer.state_dict())
