"""What torch's suite checks of optimizers as objects, for every rule in every format: copies, files, hooks, groups."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from tests.optim.every_rule import PAIRS, RULES, made
from tests.optim.training import (
    assert_same_state,
    copies,
    gradients,
    largest_difference,
    parameters,
    params_of,
    run,
    through_file,
)

SHAPES = [(18, 260), (4100,), (3, 4, 5), (6,), (), (0,), (0, 4)]  # ragged rows, flat, small, 0-dim, empty
EVERY = pytest.mark.parametrize(("rule", "state"), PAIRS)


def some() -> list[torch.Tensor]:
    """``SHAPES``, and a matrix whose rows do not lie one after another."""
    (turned,) = parameters([(66, 70)], seed=2)
    return [*parameters(SHAPES), torch.nn.Parameter(turned.detach().t().contiguous().t())]


def by_state_dict(optimizer: Any) -> Any:
    twin = type(optimizer)([{"params": copies(g["params"])} for g in optimizer.param_groups], state=state_of(optimizer))
    twin.load_state_dict(through_file(optimizer.state_dict()))
    return twin


def state_of(optimizer: Any) -> str:
    return str(optimizer.param_groups[0]["state"])


def by_torch_save(optimizer: Any) -> Any:
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


TWINS: list[Callable[[Any], Any]] = [
    copy.deepcopy,
    by_state_dict,
    by_torch_save,
    lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
]


@EVERY
def test_copies_pickles_and_state_dicts_go_on_bitwise(rule: str, state: str) -> None:
    """Groups of their own options, one of them added after a step."""
    params = some()
    strides = [p.stride() for p in params]
    optimizer = made(rule, [{"params": params[:1], "lr": torch.tensor(0.02)}, {"params": params[1:4]}], state=state)
    run(optimizer, 1)
    optimizer.add_param_group({"params": params[4:], "weight_decay": 0.1, "maximize": True})
    run(optimizer, [1])
    twins = [make(optimizer) for make in TWINS]
    run(optimizer, [2, 3])
    assert [p.stride() for p in params] == strides
    for twin in twins:
        assert (type(twin), repr(twin)) == (type(optimizer), repr(optimizer))
        assert twin.defaults.keys() == optimizer.defaults.keys()
        run(twin, [2, 3])
        assert_same_state(twin, optimizer)
        for x, y in zip(params, params_of(twin), strict=True):
            assert torch.equal(x, y)
            assert x.stride() == y.stride()


@EVERY
def test_learning_rates_may_be_tensors_and_gradients_are_left_alone(rule: str, state: str) -> None:
    found = []
    for lr in (0.0078125, torch.tensor(0.0078125), torch.tensor([0.0078125], dtype=torch.float64)):
        params = parameters(SHAPES[:4])
        optimizer = made(rule, params, lr=lr, state=state)
        run(optimizer, 2)
        expected = parameters(SHAPES[:4])
        gradients(expected, 1)
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(params, expected, strict=True))
        assert optimizer.param_groups[0]["lr"] is lr
        found.append(params)
    assert largest_difference(found[0], found[1]) == largest_difference(found[0], found[2]) == 0
    with pytest.raises(ValueError, match="lr is a tensor of shape"):
        made(rule, parameters([(3, 3)]), lr=torch.ones(2), state=state)


@EVERY
def test_state_dicts_share_memory_repeat_and_take_hooks(rule: str, state: str) -> None:
    optimizer = made(rule, parameters(SHAPES[:2]), state=state)
    run(optimizer, 1)
    seen: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda o, saved: {**saved, "ours": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, saved: {**saved, "state": dict(saved["state"])})
    optimizer.register_load_state_dict_pre_hook(lambda o, saved: seen.append("before"), prepend=True)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    first, second = optimizer.state_dict(), optimizer.state_dict()
    assert first["ours"] == 1
    assert list(first["state"]) == list(second["state"])
    for number, stored in first["state"].items():
        own = optimizer.state[params_of(optimizer)[number]]
        for name, value in stored.items():
            if name not in ("step", "shape"):
                assert value is own[name] is second["state"][number][name]  # no copies, as torch's
    assert first["param_groups"][0] is not optimizer.param_groups[0]
    optimizer.load_state_dict(first)
    assert seen == ["before saving", "before saving", "before", "loaded"]


@pytest.mark.parametrize("state", ["fp32", "8bit"])
@pytest.mark.parametrize("rule", RULES)
def test_states_follow_parameters_of_another_type(rule: str, state: str) -> None:
    """A checkpoint of a model in 32 bits is loaded for one in 16, by position whatever the names; step counts may be
    numbers; gradients that are None or set to None leave a parameter alone."""
    wide = parameters(SHAPES[:4])
    optimizer = made(rule, [(f"w{i}", p) for i, p in enumerate(wide)], state=state)
    run(optimizer, 2)
    half = [torch.nn.Parameter(p.detach().bfloat16()) for p in wide]
    other = made(rule, [(f"h{i}", p) for i, p in enumerate(half)], state=state)
    saved = optimizer.state_dict()
    for stored in saved["state"].values():
        stored["step"] = int(stored["step"])
    other.load_state_dict(saved)
    assert_same_state(other, optimizer)
    other.zero_grad(set_to_none=True)
    before = copies(half)
    other.step()
    assert_same_state(other, optimizer)
    assert largest_difference(half, before) == 0
    run(other, [2])
    assert largest_difference(half, before) > 0
    assert all(p.isfinite().all() for p in half)
    other.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in half)


@pytest.mark.parametrize("rule", RULES)
def test_hooks_of_all_optimizers_and_of_one(rule: str) -> None:
    optimizer = made(rule, parameters([(4, 5)]))
    seen: list[str] = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("all before")),
        register_optimizer_step_post_hook(lambda *_: seen.append("all after")),
        optimizer.register_step_pre_hook(lambda *_: seen.append("before")),
        optimizer.register_step_post_hook(lambda *_: seen.append("after")),
    ]
    run(optimizer, 1)
    for handle in handles:
        handle.remove()
    run(optimizer, [1])
    assert seen == ["all before", "before", "after", "all after"]


@pytest.mark.parametrize("rule", RULES)
def test_zero_gradients_move_nothing_without_decay(rule: str) -> None:
    params = parameters(SHAPES)
    before = copies(params)
    options = {"weight_decay": 0.0} if rule != "LARS" else {}
    optimizer = made(rule, params, **options)
    for _ in range(2):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert largest_difference(params, before) == 0
