"""What a GradScaler says is carried out where the host reads it; tests/interpreter has the device's part."""

from __future__ import annotations

import pytest
import torch

from memopt.kernels import step
from memopt.optim import AdamW
from tests.kernels.step_cases import SCALARS, SUMMING
from tests.optim.training import assert_same_state, gradients, parameters


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_a_guard_scales_gradients_or_calls_the_step_off(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMOPT_KERNELS", backend)
    found = []
    for factor, off in ((1.0, 0.0), (0.25, 0.0), (0.25, 1.0)):
        p, g, m = (torch.randn(3, 700, generator=torch.Generator().manual_seed(i)) for i in range(3))
        guard = torch.tensor([factor, off])
        sums = step(SUMMING, [p], [g / factor], [[m]], [None], SCALARS, guard=guard)
        found.append((p, m, sums["squares"]))
        if off:
            assert torch.equal(m, torch.randn(3, 700, generator=torch.Generator().manual_seed(2)))
            assert not sums["squares"].any()
    assert all(torch.equal(a, b) for a, b in zip(*found[:2], strict=True))
    with pytest.raises(ValueError, match="guard must be 2 float32 numbers"):
        step(SUMMING, [p], [g], [[m]], [None], SCALARS, guard=torch.ones(3))


def test_spikes_are_told_by_gradients_without_their_scale() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    params, others = parameters([(64, 300)]), parameters([(64, 300)])
    ours, plain = (AdamW(some, state="8bit", spike_threshold=2.0, maximize=True) for some in (params, others))
    for number in range(4):
        gradients(params, number)
        gradients(others, number)
        params[0].grad *= scaler.scale(torch.ones(())).item()
        plain.step()
        scaler.step(ours)
        scaler.update()
    assert torch.equal(params[0], others[0])
    assert_same_state(ours, plain)
