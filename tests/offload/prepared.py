"""Models ready to be trained with a plan and without: inputs, what their blocks save, what must come out."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from memopt.planner.values import Action
from tests.offload.models import CASES, Case, run, templates

EXACT = (Action.KEEP, Action.SWAP, Action.RECOMPUTE)


def prepared(
    name: str, steps: int = 3
) -> tuple[Case, Any, dict[str, Tensor], list[tuple[Any, ...]], list[Tensor], dict[tuple[str, int], Any]]:
    """The case, its model and the state it starts from, batches, what a plain run of them gives, what blocks save."""
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


def with_twin(
    name: str, seed: int = 3, batches: int = 4
) -> tuple[Case, Any, Any, list[tuple[Any, ...]], dict[tuple[str, int], Any]]:
    """The case, its model and a copy to be trained without a plan, batches, what blocks save."""
    case = CASES[name]
    generator = torch.Generator().manual_seed(seed)
    data = [case.inputs(generator) for _ in range(batches)]
    torch.manual_seed(seed)
    model = case.make()
    twin = copy.deepcopy(model)
    return case, model, twin, data, templates(case, model, data[0])
