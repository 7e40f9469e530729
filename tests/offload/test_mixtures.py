"""Whatever the plan keeps, swaps and recomputes: losses, gradients, buffers and random states stay bitwise the same."""

from __future__ import annotations

import pytest
import torch

from memopt.offload import apply
from memopt.planner.values import Action
from tests.offload.models import CASES, everything, make_plan, mixture, run, same, templates

EXACT = (Action.KEEP, Action.SWAP, Action.RECOMPUTE)


def _prepared(name: str, steps: int = 3):
    case = CASES[name]
    generator = torch.Generator().manual_seed(7)
    batches = [case.inputs(generator) for _ in range(steps)]
    torch.manual_seed(1)
    model = case.make()
    start = {key: value.clone() for key, value in model.state_dict().items()}
    expected = run(case, model, batches)
    model.load_state_dict(start)
    model.zero_grad()
    found = templates(case, model, batches[0])
    return case, model, start, batches, expected, found


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("action", EXACT)
def test_one_action_for_all(name: str, action: Action) -> None:
    case, model, _, batches, expected, found = _prepared(name)
    with apply(model, make_plan(case, everything(found, action))) as handle:
        assert same(run(case, model, batches), expected)
        assert handle.counts.whole == 0, handle.counts.reasons
        assert (handle.counts.replays > 0) == (action is Action.RECOMPUTE)


@pytest.mark.parametrize("name", CASES)
def test_random_mixtures(name: str) -> None:
    case, model, start, batches, expected, found = _prepared(name)
    for seed in range(12):
        model.load_state_dict(start)
        tier = "disk" if seed % 3 == 0 else "host"
        with apply(model, make_plan(case, mixture(found, seed, EXACT), tier)) as handle:
            assert same(run(case, model, batches), expected), seed
            assert handle.counts.whole == 0, handle.counts.reasons
