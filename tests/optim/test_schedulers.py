"""Every learning-rate scheduler that torch offers drives our optimizers as it drives torch's."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from memopt.optim import AdamW
from tests.optim.every_rule import RULES, made
from tests.optim.training import largest_difference, parameters, run

# What a scheduler cannot be made without.
ARGUMENTS: dict[str, Any] = {
    "LambdaLR": {"lr_lambda": lambda step: 0.9**step},
    "MultiplicativeLR": {"lr_lambda": lambda step: 0.9},
    "StepLR": {"step_size": 2},
    "MultiStepLR": {"milestones": [1, 3]},
    "ExponentialLR": {"gamma": 0.8},
    "CosineAnnealingLR": {"T_max": 5},
    "CosineAnnealingWarmRestarts": {"T_0": 2},
    "CyclicLR": {"base_lr": 1e-3, "max_lr": 1e-2},
    "OneCycleLR": {"max_lr": 1e-2, "total_steps": 8},
    "ReduceLROnPlateau": {"patience": 0},
}


def build(name: str, optimizer: torch.optim.Optimizer) -> Any:
    if name == "SequentialLR":
        parts = [lr_scheduler.ConstantLR(optimizer, 0.5, 2), lr_scheduler.ExponentialLR(optimizer, 0.9)]
        return lr_scheduler.SequentialLR(optimizer, parts, milestones=[2])
    if name == "ChainedScheduler":
        parts = [lr_scheduler.ConstantLR(optimizer, 0.5, 2), lr_scheduler.ExponentialLR(optimizer, 0.9)]
        return lr_scheduler.ChainedScheduler(parts)
    return getattr(lr_scheduler, name)(optimizer, **ARGUMENTS.get(name, {}))


def offered() -> list[str]:
    named = [name for name in lr_scheduler.__all__ if inspect.isclass(getattr(lr_scheduler, name))]
    return [name for name in named if name != "LRScheduler"]


@pytest.mark.parametrize("name", offered())
def test_schedulers_move_ours_as_torchs(name: str) -> None:
    found = []
    for rule, options in ((torch.optim.AdamW, {}), (AdamW, {"state": "fp32"})):
        params = parameters([(20, 30)])
        optimizer = rule(params, lr=0.01, **options)
        scheduler = build(name, optimizer)
        rates = []
        for step in range(6):
            run(optimizer, [step])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's own, of SequentialLR's use of its parts
                scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            rates.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"]))
        found.append((params, rates))
    assert found[0][1] == found[1][1]
    assert len(set(found[1][1])) > 1
    assert largest_difference(found[0][0], found[1][0]) <= 6 * 2.0**-21


CYCLED = pytest.mark.parametrize("name", ["OneCycleLR", "CyclicLR"])


def momenta(name: str, optimizer: torch.optim.Optimizer) -> list[float]:
    scheduler, found = build(name, optimizer), []
    for step in range(3):
        run(optimizer, [step])
        group = optimizer.param_groups[0]
        found.append(group["betas"][0] if "betas" in group else group["momentum"])
        scheduler.step()
    return found


@CYCLED
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "Adagrad"])
def test_momentum_is_cycled_where_a_rule_has_it(rule: str, name: str) -> None:
    """As torch's: betas' first where there are betas, else the momentum."""
    found = momenta(name, made(rule, parameters([(20, 30)])))
    assert found == momenta(name, torch.optim.SGD(parameters([(20, 30)]), lr=0.01, momentum=0.9))
    assert len(set(found)) > 1


@CYCLED
def test_a_rule_without_momentum_is_refused_by_torch(name: str) -> None:
    with pytest.raises(ValueError, match="must support momentum or beta1"):
        build(name, made("Adagrad", parameters([(20, 30)])))
