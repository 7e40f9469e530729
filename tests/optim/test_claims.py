"""What the page promises of every rule, checked for every rule: climbing, compensation, rounding, refusals, torch."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor

import memopt.optim as room
from memopt.optim import AdamW, ZerothOrder, convert
from memopt.optim.formats import names
from tests.optim.coverage_models import loss_of, tiny, values
from tests.optim.every_rule import PAIRS, RULES, made, usual
from tests.optim.training import (
    assert_resumes_bitwise,
    assert_same_state,
    copies,
    gradients,
    largest_difference,
    parameters,
    params_of,
    run,
    through_file,
)

SHAPES = [(70, 80), (9,)]
EVERY = pytest.mark.parametrize(("rule", "state"), PAIRS)


@EVERY
def test_climbing_is_descending_on_turned_gradients(rule: str, state: str) -> None:
    found = []
    for maximize in (True, False):
        params = parameters(SHAPES)
        optimizer = made(rule, params, maximize=maximize, state=state)
        for step in range(2):
            gradients(params, step, 1.0 if maximize else -1.0)
            optimizer.step()
        found.append((params, optimizer))
    assert largest_difference(found[0][0], found[1][0]) == 0
    for ours, theirs in zip(found[0][1].state.values(), found[1][1].state.values(), strict=True):
        assert all(torch.equal(torch.as_tensor(ours[k]), torch.as_tensor(v)) for k, v in theirs.items())


@pytest.mark.parametrize("rule", RULES)
def test_compensated_bf16_follows_fp32_parameters(rule: str) -> None:
    """Ten steps far below bf16's spacing: what rounding takes off is kept. The compensation has 2**-8 of the
    parameter's spacing, so that its own rounding leaves at most a 64th of plain rounding's error over these steps."""
    found: dict[str, Tensor] = {}
    for name, dtype, rounding in (
        ("exact", torch.float32, "nearest"),
        ("kept", torch.bfloat16, "kahan"),
        ("lost", torch.bfloat16, "nearest"),
    ):
        params = [torch.nn.Parameter(p.detach().bfloat16().to(dtype)) for p in parameters([(64, 96), (40, 31)])]
        optimizer = made(rule, params, state="fp32", param_rounding=rounding, lr=1e-3 if rule == "LARS" else 1e-4)
        for step in range(10):
            gradients(params, step)
            for p in params:
                p.grad = p.grad.bfloat16().to(dtype)
            optimizer.step()
        lost = [optimizer.state[p].get("compensation", torch.zeros(())).float() for p in params]
        found[name] = torch.cat([(p.detach().float() + c).flatten() for p, c in zip(params, lost, strict=True)])
    errors = {name: float((value - found["exact"]).abs().mean()) for name, value in found.items()}
    assert errors["lost"] > 0
    assert errors["kept"] <= errors["lost"] / 64


@pytest.mark.parametrize("state", names())
@pytest.mark.parametrize("rule", ["Adam", "AdamW"])
def test_the_largest_moment_never_falls_in_any_format(rule: str, state: str) -> None:
    """One large gradient, then none: the other moment decays, and the largest stays what it was stored as."""
    (param,) = parameters([(16, 300)])
    optimizer = made(rule, [param], amsgrad=True, state=state, betas=(0.9, 0.5))
    gradients([param], 0)
    optimizer.step()
    slot = optimizer.slot(0, optimizer.param_groups[0], param, optimizer.state[param])
    specs = {spec.name: spec for spec in slot.specs}
    first = {name: slot.decode(spec) for name, spec in specs.items()}
    for _ in range(4):
        param.grad.zero_()
        optimizer.step()
    last = {name: slot.decode(spec) for name, spec in specs.items()}
    assert last["exp_avg_sq"].sum() <= 0.1 * first["exp_avg_sq"].sum()  # 2**-4, and rounding
    # stochastic rounding moves a value to a neighbouring level and back, without bias
    assert last["max_exp_avg_sq"].sum() >= 0.98 * first["max_exp_avg_sq"].sum()
    assert_resumes_bitwise(lambda params: made(rule, params, amsgrad=True, state=state), parameters(SHAPES))


def test_no_rule_takes_the_state_dict_of_another() -> None:
    optimizers = {rule: made(rule, parameters(SHAPES)) for rule in RULES}
    for optimizer in optimizers.values():
        run(optimizer, 1)
    saved = {rule: through_file(optimizer.state_dict()) for rule, optimizer in optimizers.items()}
    for rule, optimizer in optimizers.items():
        untouched = copy.deepcopy(optimizer)
        for other in RULES:
            if other != rule:
                with pytest.raises(ValueError, match=f"it is of rule {other.lower()!r}, this optimizer is"):
                    optimizer.load_state_dict(saved[other])
        assert_same_state(optimizer, untouched)


def test_skipped_steps_are_counted_on_after_a_restart() -> None:
    params = parameters(SHAPES)
    optimizer = AdamW(params, skip_nonfinite=True)
    gradients(params, 0)
    params[0].grad[0, 0] = torch.nan
    optimizer.step()
    again = AdamW(copies(params), skip_nonfinite=True)
    again.load_state_dict(through_file(optimizer.state_dict()))
    for p, q in zip(params_of(again), params, strict=True):
        p.grad = q.grad
    again.step()
    assert again.param_groups[0]["skipped_steps"] == 2


@pytest.mark.parametrize("state", ["fp32", "8bit"])
@pytest.mark.parametrize("rule", ["Adagrad", "Adam", "AdamW", "Muon", "RMSprop", "SGD"])
def test_torchs_own_goes_on_from_ours_and_back(rule: str, state: str) -> None:
    """Every rule that torch has: its step on the decoded states is ours in fp32, and back again nothing is lost."""
    params = parameters([(64, 96), (97, 31)])
    ours = made(rule, params, state=state)
    run(ours, 3)
    start = copies(params)
    plain = copies(params)
    theirs = getattr(torch.optim, rule)(plain, **usual(rule))
    theirs.load_state_dict(through_file(convert(ours.state_dict(), "memopt", "torch")))
    assert theirs.param_groups[0]["lr"] == 0.01
    back = made(rule, copies(params), state=state)
    back.load_state_dict(convert(theirs.state_dict(), "torch", back))
    for optimizer in (ours, theirs, back):
        run(optimizer, [5])
    moved = largest_difference(params, start)
    # as in torch's suite between its own implementations; Muon works in bf16
    allowed = moved * 2.0**-5 if rule == "Muon" else 2e-6 + 1e-5 * moved
    assert largest_difference(params, plain) <= allowed
    assert largest_difference(params, params_of(back)) <= (0.0 if state == "fp32" else moved * 2.0**-12)


def test_zeroth_order_copies_and_refuses_what_does_not_fit() -> None:
    for rule in ("sgd", "adamw8bit"):
        model = tiny()
        optimizer = ZerothOrder(model, rule, lr=1e-3, blocks="auto")
        torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        optimizer.step(lambda model=model: loss_of(model, 0))
        twin, other = copy.deepcopy((model, optimizer))
        for one, two in ((model, optimizer), (twin, other)):
            two.step(lambda one=one: loss_of(one, 1))
        assert all(torch.equal(a, b) for a, b in zip(values(model).values(), values(twin).values(), strict=True))
        saved = copy.deepcopy(optimizer.state_dict())
        wrong: list[tuple[str, Any]] = [("steps", "a"), ("steps", -1), ("seed", 1.5), ("skipped_steps", None)]
        for name, value in wrong:
            position = json.loads(saved["param_groups"][0]["zeroth_order"])
            spoiled = copy.deepcopy(saved)
            spoiled["param_groups"][0]["zeroth_order"] = json.dumps({**position, name: value})
            with pytest.raises(ValueError, match=f"cannot be read, nothing loaded: {name} is"):
                optimizer.load_state_dict(spoiled)
        with pytest.raises(TypeError, match="state_dict is a NoneType"):
            optimizer.load_state_dict(None)
        with pytest.raises(ValueError, match="parameters of this ZerothOrder are fixed"):
            optimizer.add_param_group({"params": parameters([(3,)])})
        assert optimizer.steps == 2


def test_every_short_name_is_its_rule_in_that_format() -> None:
    for rule in RULES:
        for state in ("8bit", "4bit"):
            assert made(f"{rule}{state}", parameters([(3, 3)])).param_groups[0]["state"] == state
            assert issubclass(getattr(room, f"{rule}{state}"), getattr(room, rule))
