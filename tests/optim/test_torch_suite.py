"""torch's own optimizer inputs (``optim_db``), and the behaviours its suite checks, for every rule."""

from __future__ import annotations

import copy
import importlib.util
import sys
import types
import unittest
from typing import Any

import pytest
import torch

import memopt.optim as room
from tests.optim.every_rule import RULES, made
from tests.optim.training import copies, gradients, largest_difference, parameters, run


def _optim_db() -> list[Any]:
    """torch's table of optimizers and their inputs.

    Its module imports ``expecttest``, which torch does not require and the table does not use: where it is missing, an
    empty one stands in while the import lasts, and no other module sees it.
    """
    missing = importlib.util.find_spec("expecttest") is None
    if missing:
        sys.modules["expecttest"] = stand_in = types.ModuleType("expecttest")
        stand_in.TestCase = unittest.TestCase  # type: ignore[attr-defined]
    try:
        from torch.testing._internal.common_optimizers import optim_db
    finally:
        if missing:
            del sys.modules["expecttest"]
    return optim_db


IGNORED = ("foreach", "fused", "capturable", "differentiable")


def _inputs() -> list[Any]:
    found = []
    for info in _optim_db():
        name = info.optim_cls.__name__
        if name not in RULES:
            continue
        for one in info.optim_inputs_func(device="cpu", dtype=torch.float32):
            if not any(option in one.kwargs for option in IGNORED):
                found.append(pytest.param(info.optim_cls, one.kwargs, id=f"{name}-{one.desc}".replace(" ", "_")))
    return found


@pytest.mark.parametrize(("theirs", "options"), _inputs())
def test_every_input_of_torchs_suite_gives_torchs_values(theirs: type, options: dict[str, Any]) -> None:
    shapes = [(10, 5), (33, 20)] if theirs.__name__ == "Muon" else [(10, 5), (10,), (3, 4, 5), (33, 20)]
    ours, reference = parameters(shapes), parameters(shapes)
    run(getattr(room, theirs.__name__)(ours, state="fp32", **options), 7)
    run(theirs(reference, **options), 7)
    # torch's suite allows 1e-5 relative and 1e-6 absolute between its own implementations in fp32; Muon works in bf16.
    moved = largest_difference(reference, parameters(shapes))
    allowed = moved * 2.0**-5 if theirs.__name__ == "Muon" else 2e-6 + 1e-5 * moved
    assert largest_difference(ours, reference) <= allowed


def _shapes(state: str) -> list[tuple[int, ...]]:
    return [(70, 80), (33, 200), (4, 3, 5), (10,), (), (0,), (0, 4)]


@pytest.mark.parametrize("state", ["fp32", "8bit"])
@pytest.mark.parametrize("rule", RULES)
class TestBehaviours:
    """What torch's suite checks of each of its own optimizers."""

    def test_groups_differ_and_can_be_added(self, rule: str, state: str) -> None:
        params = parameters(_shapes(state))
        optimizer = made(rule, [{"params": params[:1], "lr": 0.0}], state=state)
        optimizer.add_param_group({"params": params[1:], "weight_decay": 0.1})
        before = copies(params)
        run(optimizer, 2)
        assert torch.equal(params[0], before[0])
        assert largest_difference(params[1:], before[1:]) > 0
        assert optimizer.param_groups[1]["lr"] == 0.01
        with pytest.raises(ValueError, match="some parameters appear in more than one"):
            optimizer.add_param_group({"params": params[:1]})

    def test_parameters_that_are_not_contiguous_keep_their_layout(self, rule: str, state: str) -> None:
        (plain,) = parameters([(66, 130)])
        turned = torch.nn.Parameter(plain.detach().t().contiguous().t())
        spread = torch.nn.Parameter(torch.zeros(66, 260)[:, ::2].copy_(plain.detach()))
        strides = [p.stride() for p in (plain, turned, spread)]
        assert len(set(strides)) == 3
        for param in (plain, turned, spread):
            run(made(rule, [param], state=state), 3)
        assert [p.stride() for p in (plain, turned, spread)] == strides
        # Muon's matrix products may be summed in another order where the layout differs.
        allowed = 1e-3 if "Muon" in rule else 0.0 if rule not in ("LAMB", "LARS", "AdamMini") else 1e-6
        assert largest_difference([plain, plain], [turned, spread]) <= allowed

    def test_bf16_and_fp16_parameters(self, rule: str, state: str) -> None:
        for dtype in (torch.bfloat16, torch.float16):
            for rounding in ("nearest", "stochastic"):
                params = parameters([(70, 80), (33, 200)], dtype)
                wide = [torch.nn.Parameter(p.detach().float()) for p in params]
                start = copies(params)
                gradients(params, 0)
                for p, q in zip(wide, params, strict=True):
                    p.grad = q.grad.float()
                made(rule, params, state=state, param_rounding=rounding).step()
                made(rule, wide, state=state).step()
                assert all(p.dtype == dtype for p in params)
                assert largest_difference(params, start) > 0
                spacing = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-10
                for p, q in zip(params, wide, strict=True):
                    error = (p.detach().float() - q.detach()).abs()
                    room_left = q.detach().abs() * spacing + 1e-6  # a whole spacing, which stochastic rounding may take
                    slack = 2e-3 if "Muon" in rule else 0.0
                    assert bool((error <= room_left + slack).all())

    def test_no_gradient_no_change(self, rule: str, state: str) -> None:
        params = parameters(_shapes(state))
        before = copies(params)
        optimizer = made(rule, params, state=state)
        optimizer.step()
        assert not optimizer.state
        assert largest_difference(params, before) == 0

    def test_nan_is_where_fp32_has_it(self, rule: str, state: str) -> None:
        """One bad gradient element: the same elements are finite after two steps as with fp32 states."""
        finite = []
        for kept in ("fp32", state):
            params = parameters([(70, 256), (33, 200)])
            optimizer = made(rule, params, state=kept)
            for step in range(2):
                gradients(params, step)
                if step == 0:
                    params[0].grad[3, 4] = torch.nan
                optimizer.step()
            finite.append([p.isfinite() for p in params])
        assert all(torch.equal(x, y) for x, y in zip(*finite, strict=True))

    def test_grad_scaler_divides_in_the_pass_and_skips_what_overflows(self, rule: str, state: str) -> None:
        """The values of a run on plain gradients, bit for bit: scales are powers of two; gradients are left alone."""
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        params, others = parameters(_shapes(state)), parameters(_shapes(state))
        ours, plain = made(rule, params, state=state), made(rule, others, state=state)
        for step in range(4):
            gradients(params, step)
            gradients(others, step)
            scale = scaler.scale(torch.ones(())).item()
            for param in params:
                param.grad *= scale
            if step == 1:
                params[1].grad[0, 0] = torch.inf
            else:
                plain.step()
            if step == 3:
                scaler.unscale_(ours)
            before = params[0].grad.clone()
            scaler.step(ours)
            scaler.update()
            assert torch.equal(params[0].grad, before)
        assert all(torch.equal(x, y) for x, y in zip(params, others, strict=True))

    def test_nonfinite_gradients_can_skip_the_step(self, rule: str, state: str) -> None:
        params = parameters(_shapes(state))
        optimizer = made(rule, params, state=state, skip_nonfinite=True)
        run(optimizer, 1)
        before, kept = copies(params), copy.deepcopy(optimizer.state_dict()["state"])
        for value in (torch.nan, -torch.inf):
            gradients(params, 1)
            params[1].grad[3, 4] = value
            optimizer.step()
        assert all(torch.equal(x, y) for x, y in zip(params, before, strict=True))
        assert optimizer.param_groups[0]["skipped_steps"] == 2
        for number, stored in optimizer.state_dict()["state"].items():
            assert all(torch.equal(value, kept[number][name]) for name, value in stored.items())


def test_sparse_and_complex_are_refused_by_every_rule() -> None:
    for rule in RULES:
        param = torch.nn.Parameter(torch.zeros(4, 3))
        param.grad = torch.zeros(4, 3).to_sparse()
        with pytest.raises(RuntimeError, match="sparse gradient"):
            made(rule, [param]).step()
        with pytest.raises(ValueError, match="real floating-point"):
            made(rule, [torch.zeros(4, 3, dtype=torch.complex64)])
