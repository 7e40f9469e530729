"""Whatever the plan keeps, swaps and recomputes: losses, gradients, buffers and random states stay bitwise the same."""

from __future__ import annotations

import pytest
import torch

from memopt.offload import apply
from memopt.planner.values import Action
from tests.offload.models import CASES, everything, make_plan, mixture, parted, run, same, step_loss
from tests.offload.prepared import EXACT, prepared


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("action", EXACT)
def test_one_action_for_all(name: str, action: Action) -> None:
    case, model, _, batches, expected, found = prepared(name)
    with apply(model, make_plan(case, everything(found, action))) as handle:
        assert same(run(case, model, batches), expected)
        assert handle.counts.whole == 0, handle.counts.reasons
        assert (handle.counts.replays > 0) == (action is Action.RECOMPUTE)


@pytest.mark.parametrize("name", ["gpt-autocast", "twice"])
def test_random_mixtures(name: str) -> None:
    case, model, start, batches, expected, found = prepared(name)
    for seed in range(12):
        model.load_state_dict(start)
        plan = make_plan(case, mixture(found, seed, EXACT), "disk" if seed % 3 == 0 else "host")
        with apply(model, parted(plan, found, seed) if seed % 2 else plan) as handle:
            assert same(run(case, model, batches), expected), seed
            assert handle.counts.whole == 0, handle.counts.reasons


MODELS = ("gpt", "resnet", "t5", "llama-autocast", "views")


@pytest.mark.parametrize("name", MODELS)
def test_two_hundred_mixtures(name: str) -> None:
    """40 mixtures for each of 5 models, two for every step of 20 steps with dropout: all of it bitwise as without."""
    case, model, start, batches, _, found = prepared(name, 20)

    def train(planned: bool) -> list[torch.Tensor]:
        model.load_state_dict(start)
        model.zero_grad()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        torch.manual_seed(123)
        seen = []
        for n in range(40):
            plan = make_plan(case, mixture(found, 100 + n, EXACT) if planned else {})
            with apply(model, parted(plan, found, n) if planned and n % 4 == 3 else plan) as handle:
                loss = step_loss(case, model, batches[n // 2])
                loss.backward()
            assert handle.counts.whole == 0, handle.counts.reasons
            seen.append(loss.detach())
            if n % 2:
                seen += [p.grad.clone() for p in model.parameters()]
                optimizer.step()
                optimizer.zero_grad()
        return [*seen, *(value.clone() for value in model.state_dict().values()), torch.get_rng_state()]

    assert same(train(True), train(False))
