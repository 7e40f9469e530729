"""Batches and passes that are kept from step to step: whatever changes in between, values are those of fresh ones."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from memopt.optim import SGD, AdamW, AdamW8bit, make
from memopt.optim.gathering import Gathering
from memopt.optim.optimizer import RuleOptimizer
from tests.optim.training import assert_same_state, copies, gradients, parameters

SHAPES = [(64, 300), (97, 101), (32, 16, 3, 3), (5000,), (8,), ()]


def _new_gradients(optimizer: Any, step: int) -> None:
    optimizer.zero_grad()
    gradients([p for group in optimizer.param_groups for p in group["params"]], step)


def _kept_gradients(optimizer: Any, step: int) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    held = [p.grad for p in params]
    gradients(params, step)
    for param, grad in zip(params, held, strict=True):
        if grad is not None:
            param.grad = grad.copy_(param.grad)


def _strided_gradients(optimizer: Any, step: int) -> None:
    _new_gradients(optimizer, step)
    if step == 3:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.dim() == 2:
                    p.grad = p.grad.t().contiguous().t()


def _wide_gradients(optimizer: Any, step: int) -> None:
    _new_gradients(optimizer, step)
    for group in optimizer.param_groups:
        for p in group["params"]:
            if step >= 3 and p.dtype == torch.bfloat16:
                p.grad_dtype = None
                p.grad = p.grad.float()


def _some_missing(optimizer: Any, step: int) -> None:
    _new_gradients(optimizer, step)
    if step in (2, 3):
        optimizer.param_groups[0]["params"][1].grad = None


def _moved_parameters(optimizer: Any, step: int) -> None:
    _new_gradients(optimizer, step)
    if step == 3:
        for p in optimizer.param_groups[0]["params"]:
            p.data = p.detach().clone()


def _turned_parameter(optimizer: Any, step: int) -> None:
    if step == 3:
        first = optimizer.param_groups[0]["params"][0]
        first.data = first.detach().t().contiguous().t()
    _new_gradients(optimizer, step)


def _states_replaced(optimizer: Any, step: int) -> None:
    _new_gradients(optimizer, step)
    if step == 3:
        for stored in optimizer.state.values():
            stored.update({k: v.clone() for k, v in stored.items() if isinstance(v, torch.Tensor)})


def _state_dropped(optimizer: Any, step: int) -> None:
    _new_gradients(optimizer, step)
    if step == 3:
        del optimizer.state[optimizer.param_groups[0]["params"][2]]


def _state_loaded(optimizer: Any, step: int) -> None:
    _new_gradients(optimizer, step)
    if step == 3:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def _rates_change(optimizer: Any, step: int) -> None:
    _new_gradients(optimizer, step)
    group = optimizer.param_groups[0]
    group["lr"], group["weight_decay"], group["betas"] = 1e-3 * step, 0.1 * (step % 2), (0.9 - step / 100, 0.99)
    if step == 4:
        group["lr"] = torch.tensor(2e-3)


def _options_change(optimizer: Any, step: int) -> None:
    _new_gradients(optimizer, step)
    group = optimizer.param_groups[0]
    group["maximize"], group["seed"] = step == 3, step // 2
    group["param_rounding"] = "stochastic" if step == 4 else "nearest"


def _groups_added(optimizer: Any, step: int) -> None:
    if step == 3:
        optimizer.add_param_group({"params": parameters([(70, 80)], seed=9), "lr": 1e-2})
    if step == 4:
        optimizer.param_groups[0]["params"].reverse()
    _new_gradients(optimizer, step)


CHANGES = [
    _new_gradients, _kept_gradients, _strided_gradients, _wide_gradients, _some_missing, _moved_parameters,
    _turned_parameter, _states_replaced, _state_dropped, _state_loaded, _rates_change, _options_change, _groups_added,
]  # fmt: skip


def _forgetting(optimizer: RuleOptimizer) -> None:
    optimizer._gathering = Gathering()


def _train(change: Callable[[Any, int], None], dtype: torch.dtype, name: str, forget: bool) -> tuple[Any, list[Any]]:
    params = parameters(SHAPES, dtype)
    optimizer = make(name, params)
    for step in range(6):
        change(optimizer, step)
        if forget:
            _forgetting(optimizer)
        optimizer.step()
    return optimizer, [p.detach() for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
@pytest.mark.parametrize(("name", "dtype"), [("adamw8bit", torch.float32), ("adamw4bit", torch.bfloat16)])
def test_kept_batches_give_what_fresh_ones_give(
    change: Callable[[Any, int], None], name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, values = _train(change, dtype, name, forget=False)
    monkeypatch.setattr("memopt.kernels.prepare", lambda *_: None)  # no pass is prepared
    fresh, wanted = _train(change, dtype, name, forget=True)
    assert all(torch.equal(x, y) for x, y in zip(values, wanted, strict=True))
    assert_same_state(ours, fresh)


def test_steps_of_the_same_kind_use_the_prepared_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters(SHAPES)
    optimizer = AdamW8bit(params)
    _new_gradients(optimizer, 0)
    optimizer.step()
    monkeypatch.setattr("memopt.kernels.stepping.step_request", None)  # every other way to a kernel
    for step in range(1, 5):
        _new_gradients(optimizer, step)
        optimizer.param_groups[0]["lr"] = 1e-4 * step
        optimizer.step()
    assert optimizer.state[params[0]]["step"] == 5


def test_a_momentum_that_appears_gets_its_state() -> None:
    (param,) = parameters([(64, 80)])
    optimizer = SGD([param], lr=0.1, momentum=0.0, state="8bit")
    for step in range(4):
        gradients([param], step)
        if step == 2:
            optimizer.param_groups[0]["momentum"] = 0.9
            optimizer.state.clear()
        optimizer.step()
    assert "momentum_buffer_codes" in optimizer.state[param]


def test_nothing_keeps_gradients_or_old_states_alive() -> None:
    params = parameters(SHAPES)
    optimizer = AdamW(params, state="8bit")
    for step in range(3):
        _new_gradients(optimizer, step)
        optimizer.step()
    gone = [weakref.ref(params[0].grad), weakref.ref(optimizer.state[params[0]]["exp_avg_codes"])]
    optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_a_skipped_step_leaves_the_next_one_right() -> None:
    params, others = parameters([(64, 80)]), parameters([(64, 80)])
    ours, plain = AdamW8bit(params, skip_nonfinite=True), AdamW8bit(others)
    for step in range(5):
        gradients(params, step)
        if step == 2:
            params[0].grad[1, 2] = torch.inf
        else:
            gradients(others, step)
            plain.step()
        ours.step()
    assert torch.equal(params[0], others[0])
    assert ours.param_groups[0]["skipped_steps"] == 1


def test_released_gradients_take_kept_batches_too() -> None:
    from memopt.optim import release_gradients

    model = torch.nn.Sequential(torch.nn.Linear(80, 80), torch.nn.Tanh(), torch.nn.Linear(80, 80))
    twin = copy.deepcopy(model)
    ours, plain = AdamW8bit(model.parameters()), AdamW8bit(twin.parameters())
    inputs = torch.randn(4, 80, generator=torch.Generator().manual_seed(3))
    with release_gradients(ours):
        for _ in range(4):
            model(inputs).square().mean().backward()
            twin(inputs).square().mean().backward()
            plain.step()
            plain.zero_grad()
    assert all(torch.equal(x, y) for x, y in zip(copies(list(model.parameters())), twin.parameters(), strict=True))
    assert len(ours._gathering._kept) == 4
