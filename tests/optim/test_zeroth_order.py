"""ZerothOrder: against the rules written out with the directions it draws, against true gradients, and resumed."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memopt.optim import AdamW, AdamW8bit, ZerothOrder, directions
from tests.optim.coverage_models import assert_same, loss_of, tiny, values


def drawn(optimizer: ZerothOrder, param: Tensor, sample: int) -> Tensor:
    """The direction as one tensor of the parameter's shape."""
    return torch.cat([z.flatten() for _, z in optimizer._directions().of(param, sample)]).view(param.shape)


def double(size: int = 7) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(size, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def smooth_loss(model: nn.Module) -> Tensor:
    return model(torch.linspace(-1, 1, 28, dtype=torch.float64).view(4, 7)).square().sum()


@pytest.mark.parametrize("chunk", [3, 1 << 20])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize("rule", ["sgd", "sign", "adam"])
def test_steps_are_the_rules_written_out(
    rule: str, sides: int, samples: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directions, "CHUNK", chunk)
    model, plain = double(), double()
    options = {"lr": 0.02, "eps": 1e-4, "samples": samples, "sides": sides, "weight_decay": 0.3}
    optimizer = ZerothOrder(model, torch.optim.AdamW if rule == "adam" else rule, **options)
    reference = torch.optim.AdamW(plain.parameters(), lr=0.02, weight_decay=0.3)
    for _ in range(4):
        estimate = {p: torch.zeros_like(q) for p, q in zip(model.parameters(), plain.parameters(), strict=True)}
        for sample in range(samples):
            zs = [drawn(optimizer, p, sample).double() for p in model.parameters()]
            around = []
            for side in (1, -1 if sides == 2 else 0):
                moved = copy.deepcopy(plain)
                with torch.no_grad():
                    for p, z in zip(moved.parameters(), zs, strict=True):
                        p += side * 1e-4 * z
                around.append(smooth_loss(moved).item())
            slope = (around[0] - around[1]) / (sides * 1e-4)
            for p, z in zip(model.parameters(), zs, strict=True):
                estimate[p] += slope * z / samples
        with torch.no_grad():
            for p, q in zip(model.parameters(), plain.parameters(), strict=True):
                q.grad = estimate[p]
                if rule != "adam":
                    direction = q.grad.sign() if rule == "sign" else q.grad
                    q.copy_(q * (1 - 0.02 * 0.3) - 0.02 * direction)
        if rule == "adam":
            reference.step()
        optimizer.step(lambda: smooth_loss(model))
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_directions_are_standard_normal_and_differ() -> None:
    weight = nn.Parameter(torch.zeros(300, 301))
    other = nn.Parameter(torch.zeros(300, 301))
    optimizer = ZerothOrder([weight, other])
    first = drawn(optimizer, weight, 0)
    count = first.numel()
    # five standard deviations of the mean, the variance and the correlation of as many independent normals
    assert abs(first.mean()) < 5 / math.sqrt(count)
    assert abs(first.var() - 1) < 5 * math.sqrt(2 / count)
    assert torch.equal(first, drawn(optimizer, weight, 0))
    seen = [drawn(optimizer, weight, 1), drawn(optimizer, other, 0)]
    optimizer.steps = 1
    seen.append(drawn(optimizer, weight, 0))
    seen.append(drawn(ZerothOrder([weight], seed=1), weight, 0))
    for z in seen:
        assert abs((first * z).mean()) < 5 / math.sqrt(count)


def test_the_mean_estimate_is_the_gradient() -> None:
    """The estimate along one direction has the gradient as its mean and, per element, variance |g|^2 + g_i^2."""
    model = double()
    smooth_loss(model).backward()
    truth = torch.cat([p.grad.flatten() for p in model.parameters()])
    optimizer = ZerothOrder(model, eps=1e-5)
    samples = 3000
    total = torch.zeros_like(truth)
    for step in range(samples):
        optimizer.steps = step
        params = list(model.parameters())
        with torch.no_grad():
            _, (slope,) = optimizer._measure(lambda: smooth_loss(model), params)
        total += slope * torch.cat([drawn(optimizer, p, 0).flatten() for p in params])
    spread = (truth.square().sum() + truth.square()).sqrt() / math.sqrt(samples)
    assert ((total / samples - truth).abs() < 5 * spread).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_parameters_come_back_up_to_one_rounding_each_way(dtype: torch.dtype) -> None:
    model = tiny(dtype)
    before = values(model)
    optimizer = ZerothOrder(model, lr=0.0, samples=2)
    optimizer.step(lambda: loss_of(model, 0))
    for name, p in model.named_parameters():
        reach = before[name].abs().double() + 6e-3
        assert ((p.double() - before[name].double()).abs() <= 6 * torch.finfo(dtype).eps * reach).all()


@pytest.mark.parametrize("rule", ["sgd", "sign", AdamW8bit, "adamw4bit", torch.optim.SGD], ids=str)
@pytest.mark.parametrize("blocks", [None, "auto"])
def test_a_resumed_run_is_the_uninterrupted_one(rule: Any, blocks: Any) -> None:
    def make(model: nn.Module, seed: int) -> ZerothOrder:
        return ZerothOrder(model, rule, lr=1e-3, samples=2, blocks=blocks, switch_every=2, seed=seed)

    model = tiny()
    optimizer = make(model, 4)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for step in range(3):
        optimizer.step(lambda step=step: loss_of(model, step))
        schedule.step()
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = tiny(seed=1)
    again.load_state_dict(saved["model"])
    other = make(again, 5)
    other.load_state_dict(saved["optimizer"])
    for step in range(3, 7):
        one = optimizer.step(lambda step=step: loss_of(model, step))
        assert one == other.step(lambda step=step: loss_of(again, step))
    assert_same(values(again), values(model))


def test_blocks_move_alone_and_in_turn() -> None:
    model = tiny()
    optimizer = ZerothOrder(model, lr=1e-3, blocks="auto", switch_every=2, order="ascending")
    for step in range(10):
        block = optimizer.active_block
        assert block is optimizer.blocks[step // 2 % 5]
        before = values(model)
        optimizer.step(lambda: loss_of(model, 0))
        moved = {name for name, value in values(model).items() if not torch.equal(value, before[name])}
        assert moved == set(block.names)
    assert ZerothOrder(model, blocks="auto", order="descending").active_block.name == "norm"


def test_nothing_is_stored_and_no_gradient_exists() -> None:
    model = tiny()
    optimizer = ZerothOrder(model, lr=1e-3)
    adam = ZerothOrder(model, AdamW, lr=1e-3, state="fp32")
    seen = []

    def closure() -> Tensor:
        seen.append((torch.is_grad_enabled(), any(p.grad is not None for p in model.parameters())))
        return loss_of(model, 0)

    optimizer.step(closure)
    assert optimizer.state_bytes() == 0
    adam.step(closure)
    assert adam.state_bytes() == 8 * sum(p.numel() for p in model.parameters())
    assert seen == [(False, False)] * 4
    assert all(p.grad is None for p in model.parameters())


def test_dropout_is_the_same_on_both_sides() -> None:
    weight = nn.Parameter(torch.zeros(4))
    masks = []

    def closure() -> Tensor:
        masks.append(nn.functional.dropout(torch.ones(1000), 0.5))
        return weight.sum()

    optimizer = ZerothOrder([weight], samples=2)
    optimizer.step(closure)
    assert all(torch.equal(mask, masks[0]) for mask in masks[1:])
    optimizer.step(closure)
    assert not torch.equal(masks[0], masks[-1])


def test_training_lowers_the_loss() -> None:
    data = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    for rule, lr in (("sgd", 5e-2), ("sign", 5e-3), (AdamW8bit, 1e-2)):
        model = nn.Linear(8, 8)
        optimizer = ZerothOrder(model, rule, lr=lr, samples=4)
        losses = [optimizer.step(lambda m=model: (m(data) - data).square().mean()) for _ in range(200)]
        assert losses[-1] < 0.5 * losses[0], rule


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    model = tiny()
    optimizer = ZerothOrder(model, lr=1.0)
    before = values(model)
    assert math.isnan(optimizer.step(lambda: float("nan")))
    assert optimizer.skipped_steps == 1
    for name, value in values(model).items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("sides", [1, 2])
def test_a_closure_that_fails_leaves_the_parameters_where_they_were(sides: int) -> None:
    """At any of its calls; both moves round once each, so each parameter is within two roundings of its value."""
    for failing in range(1 + sides):
        model = tiny()
        optimizer = ZerothOrder(model, samples=2, sides=sides, eps=0.5)
        before, calls = values(model), iter(range(failing))

        def closure(model: nn.Module = model, calls: Any = calls) -> Tensor:
            if next(calls, None) is None:
                raise MemoryError("of the closure")
            return loss_of(model, 0)

        with pytest.raises(MemoryError, match="of the closure"):
            optimizer.step(closure)
        assert optimizer.steps == 0
        for name, value in values(model).items():
            largest = before[name].abs() + 0.5 * 6  # where its perturbed value may have been
            assert ((value - before[name]).abs() <= 4 * 2.0**-24 * largest).all(), (name, failing)


def test_layouts_frozen_parameters_and_groups() -> None:
    kernel = nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    slow = nn.Parameter(torch.ones(2))
    optimizer = ZerothOrder([{"params": [kernel, frozen], "lr": 0.1}, {"params": [slow]}], lr=0.0)
    before = kernel.detach().clone()
    optimizer.step(lambda: kernel.sum() + slow.sum())
    assert not torch.equal(kernel, before)
    assert kernel.is_contiguous(memory_format=torch.channels_last)
    assert frozen.tolist() == [1.0, 1.0]
    torch.testing.assert_close(slow.detach(), torch.ones(2))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"eps": 0}, ValueError, "eps is 0"),
        ({"samples": 0}, ValueError, "samples is 0"),
        ({"sides": 3}, ValueError, "sides is 3"),
        ({"lr": -1}, ValueError, "lr is -1"),
        ({"weight_decay": float("inf")}, ValueError, "weight_decay is inf"),
        ({"order": "greedy"}, ValueError, "'greedy'"),
        ({"blocks": "all"}, ValueError, "blocks is 'all'"),
        ({"betas": (0.9, 0.99)}, TypeError, "betas"),
        ({"rule": "adamw9bit"}, ValueError, "adamw9bit"),
        ({"rule": 3}, TypeError, "base is 3"),
    ],
)
def test_wrong_options_say_what_is_wrong(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ZerothOrder(tiny(), **options)


def test_a_step_without_closure_and_a_foreign_state_dict_are_refused() -> None:
    model = tiny()
    optimizer = ZerothOrder(model)
    with pytest.raises(TypeError, match="needs a closure"):
        optimizer.step()
    with pytest.raises(ValueError, match="no position of ZerothOrder"):
        optimizer.load_state_dict(torch.optim.SGD(model.parameters()).state_dict())
