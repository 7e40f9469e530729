"""``memopt.wrap``: one call, the same numbers, less memory, and nothing half applied when it cannot."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memopt
from examples.gpt import GPT, GPTConfig
from memopt.wrapping import DoesNotFitError

CONFIG = GPTConfig(layers=3, width=64, heads=4, context=64, dropout=0.1)


def batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(256, (8, 65), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:]


def losses(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4) -> list[float]:
    torch.manual_seed(7)
    inputs, out = batch(), []
    for _ in range(steps):
        loss = model(*inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        out.append(loss.item())
    return out


def peak(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    with memopt.meter(model, optimizer) as meter:
        losses(model, optimizer, steps=1)
    return meter.peak_bytes


def test_wrapped_training_is_bitwise_plain_training_in_less_memory() -> None:
    plain = GPT(CONFIG)
    twin = copy.deepcopy(plain)
    optimizer = memopt.optim.AdamW(plain.parameters(), lr=1e-3, state="fp32")
    expected = losses(plain, optimizer)
    plain_peak = peak(plain, optimizer)
    model, wrapped, plan = memopt.wrap(
        twin, inputs=batch(), optimizer="adamw", lr=1e-3, budget=int(0.7 * plain_peak), hardware="cpu"
    )
    assert model is twin
    assert plan.peak_bytes <= 0.7 * plain_peak
    assert losses(model, wrapped) == expected
    metered = peak(model, wrapped)
    assert metered <= 0.72 * plain_peak
    assert metered == pytest.approx(plan.peak_bytes, rel=0.03)
    for a, b in zip(plain.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_full_budget_plans_nothing() -> None:
    model, _, plan = memopt.wrap(GPT(CONFIG), inputs=batch(), optimizer="adamw8bit", budget="8GiB", hardware="cpu")
    assert plan.status == "optimal"
    assert plan.peak_bytes == plan.baseline_peak_bytes
    assert {action.action.value for block in plan.blocks for action in block.actions} == {"keep"}
    assert isinstance(model, GPT)


def test_keyword_inputs_and_a_loss_function() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8))
    _, optimizer, plan = memopt.wrap(
        model,
        inputs={"input": torch.randn(16, 8)},
        optimizer="sgd",
        lr=0.1,
        budget="1GiB",
        hardware="cpu",
        loss_fn=lambda output: output.square().mean(),
    )
    assert plan.peak_bytes < 2**20
    assert type(optimizer).__name__ == "SGD"


def refused(model: nn.Module, **arguments: Any) -> str:
    """The message of a refused call; the model must be as it was."""
    before = {name: type(module).forward for name, module in model.named_modules()}
    chosen: dict[str, Any] = {"inputs": batch(), "budget": "1GiB", "hardware": "cpu", **arguments}
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the callers look at the message
        memopt.wrap(model, **chosen)
    assert {name: type(module).forward for name, module in model.named_modules()} == before
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    return str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"optimizer": "adamw7bit"}, ["adamw7bit", "adamw8bit"]),
        ({"hardware": "abacus"}, ["abacus", "h100"]),
        ({"budget": "much"}, ["much", "24GiB"]),
        ({"budget": 1000}, ["weights alone"]),
        ({"inputs": (torch.zeros(2, 3, 4, dtype=torch.long),)}, ["trace failed in", "(2, 3, 4)"]),
    ],
    ids=["optimizer", "hardware", "budget-text", "budget-below-weights", "inputs"],
)
def test_bad_input_applies_nothing(arguments: dict[str, Any], words: list[str]) -> None:
    message = refused(GPT(CONFIG), **arguments)
    for word in words:
        assert word in message


def test_options_belong_to_an_optimizer_by_name() -> None:
    model = GPT(CONFIG)
    assert "lr" in refused(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), lr=0.2)


def test_what_does_not_fit_names_the_smallest_budget_that_does() -> None:
    model = GPT(CONFIG)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    with pytest.raises(DoesNotFitError, match="smallest budget that does") as caught:
        memopt.wrap(model, inputs=batch(), budget=int(weights * 1.3), hardware="cpu")
    smallest = caught.value.plan.smallest_budget_bytes
    assert smallest is not None
    model, optimizer, plan = memopt.wrap(model, inputs=batch(), budget=smallest, hardware="cpu")
    assert plan.peak_bytes <= smallest
    assert losses(model, optimizer)[-1] < 6
