"""release_gradients: the same values as the ordinary step, with gradients never all alive."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import memopt.optim
from memopt.optim import AdamW8bit, BlockCoordinate, release_gradients
from tests.optim.coverage_models import assert_same, loss_of, tiny, train, values

CASES: list[tuple[Any, dict[str, Any]]] = [
    *((memopt.optim.AdamW, {"state": state}) for state in ("fp32", "bf16", "8bit", "4bit")),
    (memopt.optim.AdamW, {"state": "8bit", "amsgrad": True, "maximize": True}),
    (torch.optim.AdamW, {}),
    (torch.optim.AdamW, {"fused": True}),
    (torch.optim.SGD, {"momentum": 0.9}),
    (torch.optim.Adagrad, {}),
    (torch.optim.RMSprop, {"momentum": 0.5, "centered": True}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("base", "options"), CASES, ids=str)
def test_values_and_states_are_those_of_the_step(base: Any, options: dict[str, Any], dtype: torch.dtype) -> None:
    ours, plain = tiny(dtype), tiny(dtype)
    one, other = base(ours.parameters(), lr=1e-2, **options), base(plain.parameters(), lr=1e-2, **options)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.8) for o in (one, other)]
    with release_gradients(one):
        losses = train(ours, one, range(5), lambda _: schedules[0].step())
    assert losses == train(plain, other, range(5), lambda _: schedules[1].step())
    losses = train(ours, one, range(5, 8))  # released once, ordinary afterwards
    assert losses == train(plain, other, range(5, 8))
    assert_same(values(ours), values(plain))
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine["param_groups"] == theirs["param_groups"]
    for key, state in theirs["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(mine["state"][key][name]), torch.as_tensor(value)), name


def most_gradients_alive(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> int:
    most = 0
    params = list(model.parameters())

    def count(param: torch.Tensor) -> None:
        nonlocal most
        most = max(most, sum(p.grad is not None for p in params))

    hooks = [p.register_post_accumulate_grad_hook(count) for p in params]
    handle = release_gradients(optimizer)
    for p in params:  # after the release hook too
        hooks.append(p.register_post_accumulate_grad_hook(count))
    train(model, optimizer, range(steps))
    for hook in hooks:
        hook.remove()
    handle.remove()
    return most


def test_at_most_one_gradient_is_alive() -> None:
    model = tiny()
    assert most_gradients_alive(model, AdamW8bit(model.parameters())) == 1


def test_peak_memory_of_backward_falls_by_the_gradients() -> None:
    """Bytes that the CPU allocator holds, at their highest in one step, released against ordinary."""
    peaks = {}
    for released in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(16)))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        if released:
            release_gradients(optimizer)
        with torch.profiler.profile(profile_memory=True) as recorded:
            model(torch.randn(1, 512)).sum().backward()
            optimizer.step()
        level = peak = 0
        for event in recorded.profiler.kineto_results.events():
            if event.name() == "[memory]":
                level += event.nbytes()
                peak = max(peak, level)
        peaks[released] = peak
    gradient = 4 * 512 * 512
    assert peaks[False] >= 16 * gradient
    assert peaks[True] < 4 * gradient


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_accumulation_is_exact(micro: int) -> None:
    ours, plain = tiny(), tiny()
    one, other = AdamW8bit(ours.parameters(), lr=1e-2), AdamW8bit(plain.parameters(), lr=1e-2)
    handle = release_gradients(one)
    for step in range(0, 4 * micro, micro):
        with handle.accumulate():
            for index in range(micro - 1):
                loss_of(ours, step + index).backward()
        loss_of(ours, step + micro - 1).backward()
        assert all(p.grad is None for p in ours.parameters())
        one.step()
        for index in range(micro):
            loss_of(plain, step + index).backward()
        other.step()
        other.zero_grad()
    assert_same(values(ours), values(plain))


def test_micro_batches_left_over_are_used_by_the_ordinary_step() -> None:
    ours, plain = tiny(), tiny()
    one, other = AdamW8bit(ours.parameters(), lr=1e-2), AdamW8bit(plain.parameters(), lr=1e-2)
    with release_gradients(one).accumulate():
        loss_of(ours, 0).backward()
    loss_of(plain, 0).backward()
    one.step()
    other.step()
    assert_same(values(ours), values(plain))


def test_a_state_dict_loaded_afterwards_counts() -> None:
    ours, plain = tiny(), tiny()
    one, other = AdamW8bit(ours.parameters(), lr=1.0), AdamW8bit(plain.parameters(), lr=1e-2)
    release_gradients(one)
    train(plain, other, range(2))
    ours.load_state_dict(plain.state_dict())
    one.load_state_dict(other.state_dict())
    assert train(ours, one, range(2, 5)) == train(plain, other, range(2, 5))
    assert_same(values(ours), values(plain))


def test_clipping_by_value() -> None:
    ours, plain = tiny(), tiny()
    one, other = AdamW8bit(ours.parameters(), lr=1e-2), AdamW8bit(plain.parameters(), lr=1e-2)
    release_gradients(one, clip_value=1e-3)
    train(ours, one, range(3))
    for step in range(3):
        loss_of(plain, step).backward()
        nn.utils.clip_grad_value_(plain.parameters(), 1e-3)
        other.step()
        other.zero_grad()
    assert_same(values(ours), values(plain))


def test_shared_parameters_closures_groups_and_hooks() -> None:
    ours, plain = tiny(), tiny()
    for model in (ours, plain):
        model.head.weight = model.embed.weight

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        params = list(model.parameters())
        return [{"params": params[:5], "lr": 3e-2}, {"params": params[5:], "weight_decay": 0.0}]

    one, other = AdamW8bit(groups(ours), lr=1e-2), AdamW8bit(groups(plain), lr=1e-2)
    calls = []
    one.register_step_pre_hook(lambda *_: calls.append("before"))
    one.register_step_post_hook(lambda *_: calls.append("after"))
    release_gradients(one)

    def closure() -> torch.Tensor:
        one.zero_grad()
        loss = loss_of(ours, 0)
        loss.backward()
        return loss

    assert [one.step(closure).item() for _ in range(3)] == [train(plain, other, range(1))[0] for _ in range(3)]
    assert calls == ["before", "after"] * 3
    assert_same(values(ours), values(plain))


class Counting(torch.optim.SGD):
    """Keeps its step count in the group, as some optimizers do."""

    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_norm": 1.0}, "global norm needs all gradients"),
        ({"scaler": torch.amp.GradScaler("cpu")}, "GradScaler"),
        ({"clip_value": 0.0}, "clip_value is 0.0"),
        ({"clip_value": float("nan")}, "clip_value is nan"),
    ],
    ids=["norm", "scaler", "zero", "nan"],
)
def test_what_needs_all_gradients_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    model = tiny()
    optimizer = AdamW8bit(model.parameters())
    with pytest.raises(ValueError, match=message):
        release_gradients(optimizer, **options)
    assert most_gradients_alive(model, optimizer) == 1  # nothing was left behind


def test_optimizers_that_cannot_are_refused_by_name() -> None:
    model = tiny()
    with pytest.raises(TypeError, match="Tiny"):
        release_gradients(model)
    with pytest.raises(ValueError, match="LBFGS"):
        release_gradients(torch.optim.LBFGS(model.parameters()))
    with pytest.raises(ValueError, match="BlockCoordinate already"):
        release_gradients(BlockCoordinate(model, AdamW8bit))
    with pytest.raises(ValueError, match="skip_nonfinite"):
        release_gradients(AdamW8bit(tiny().parameters(), skip_nonfinite=True))
    model = tiny()
    release_gradients(Counting(model.parameters(), lr=1e-3))
    with pytest.raises(RuntimeError, match=r"Counting counts in its groups \(count\)"):
        loss_of(model, 0).backward()


def test_gradients_are_released_to_one_handle_at_a_time() -> None:
    model = tiny()
    optimizer = AdamW8bit(model.parameters())
    for _ in range(2):
        handle = release_gradients(optimizer)
        with pytest.raises(ValueError, match="AdamW8bit are released already; call remove"):
            release_gradients(optimizer)
        handle.remove()
        assert not hasattr(optimizer, "_released")
    loss_of(model, 0).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_dropped_optimizer_takes_nothing_with_it_and_is_missed() -> None:
    model = tiny()
    optimizer = AdamW8bit(model.parameters())
    release_gradients(optimizer)
    train(model, optimizer, range(1))
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    with pytest.raises(RuntimeError, match="optimizer that no longer exists"):
        loss_of(model, 0).backward()


def test_a_dropped_model_is_freed() -> None:
    model = tiny()
    optimizer = AdamW8bit(model.parameters())
    handle = release_gradients(optimizer)
    train(model, optimizer, range(1))
    gone = weakref.ref(model.head.weight)
    del model, optimizer, handle
    gc.collect()
    assert gone() is None
