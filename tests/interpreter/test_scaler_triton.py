"""GradScaler with the Triton step in the interpreter: the device's values decide, the host reads none of them."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import memopt.optim as room
from memopt.kernels import step
from tests.kernels.step_cases import ADAMW, SCALARS, check_parameters, check_state, codec_of, zeros
from tests.optim.training import assert_same_state, gradients, parameters

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")


class HostReads(TorchDispatchMode):
    """Counts what makes the host wait for a device: numbers read from tensors, and tensors compared or copied away."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("off", [False, True])
@pytest.mark.parametrize("kinds", [("sq127", "root4"), (torch.float32, torch.bfloat16)], ids=str)
def test_the_guard_scales_gradients_or_calls_the_step_off(
    kinds: tuple[Any, Any], off: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = []
    for backend in ("torch", "triton"):
        monkeypatch.setenv("MEMOPT_KERNELS", backend)
        p, states = torch.ones(3, 700), [[zeros((3, 700), kind)] for kind in kinds]
        g = torch.randn(3, 700, generator=torch.Generator().manual_seed(0)) * 2.0**10
        guard = torch.tensor([2.0**-10, float(off)])
        step(ADAMW, [p], [g], states, [codec_of(k) for k in kinds], SCALARS, seed=7, guard=guard)
        outcomes.append((p, states))
    (p, states), (ours, our_states) = outcomes
    check_parameters(ours, p, torch.ones(3, 700))
    assert bool((ours == 1.0).all()) == off
    for (a,), (b,) in zip(states, our_states, strict=True):
        check_state(b, a)


@pytest.mark.parametrize(
    ("rule", "state", "options"),
    [
        ("AdamW", "fp32", {}),
        ("AdamW", "8bit", {"spike_threshold": 50.0, "maximize": True}),
        ("AdamW", "4bit-paper", {}),
        ("Lion", "8bit", {}),
        ("SGD", "4bit", {"momentum": 0.9}),
        ("LAMB", "8bit", {}),
    ],
)
def test_a_scaled_run_is_the_plain_one_and_nothing_is_read_on_the_host(
    rule: str, state: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMOPT_KERNELS", "triton")
    shapes = [(17, 260), (9,)]
    params, others = parameters(shapes), parameters(shapes)
    kind = getattr(room, rule)
    ours, plain = kind(params, state=state, **options), kind(others, state=state, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    waits = rule == "LAMB" or state == "4bit-paper"
    for number in range(3):
        gradients(params, number)
        gradients(others, number)
        scale = scaler.scale(torch.ones(())).item()
        for param in params:
            param.grad *= scale
        if number == 1:
            params[1].grad[0] = torch.inf
        else:
            plain.step()
        with HostReads() as reads:
            scaler.step(ours)
        # One: whether the step before was called off, which arrived long ago.
        assert reads.count <= min(number, 1) or waits
        scaler.update()
        if number == 1:
            saved, other = copy.deepcopy(ours.state_dict()), copy.deepcopy(ours)
            assert_same_state(ours, plain)
            assert_same_state(other, plain)
            assert saved["state"][0]["step"] == 1
    assert all(torch.equal(x, y) for x, y in zip(params, others, strict=True))
    assert_same_state(ours, plain)
