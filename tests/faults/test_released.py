"""What earlier versions wrote still loads: a folder of files for each version under ``data``, never changed again.

``python -m tests.faults.test_released`` writes the folder of the version at hand, before its release.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import memopt
from memopt.integrations.checkpoints import Checkpoints
from memopt.optim import make
from memopt.optim.formats import names
from memopt.planner import Plan, plan, validate
from tests.optim.training import parameters, run, through_file
from tests.planner.toy import CPU, transformer

DATA = Path(__file__).with_name("data")
VERSIONS = sorted(path.name for path in DATA.iterdir())
SHAPES = ((3, 300), (9, 65), (5,))
RULES = ("adamw", "lion", "ademamix")


def write(folder: Path) -> None:
    """A plan, a checkpoint and the state dicts of this version."""
    folder.mkdir(parents=True)
    trace = transformer(2)
    plan(trace, int(trace.peak_bytes * 0.8), CPU).save(folder / "plan.json")
    states = {}
    for rule in RULES:
        for state in names():
            optimizer = make(rule, parameters(SHAPES), state=state)
            run(optimizer, 2)
            states[f"{rule} {state}"] = optimizer.state_dict()
    torch.save(states, folder / "states.pt")
    model = nn.Linear(40, 30)
    optimizer = make("adamw8bit", model.parameters())
    run(optimizer, 2)
    Checkpoints(folder / "checkpoints").save(2, model, optimizer, extra={"tokens": 640}, blocking=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_plans_load(version: str) -> None:
    found = Plan.load(DATA / version / "plan.json", transformer(2))
    assert validate(transformer(2), found, CPU).broken is None


@pytest.mark.parametrize("version", VERSIONS)
def test_state_dicts_load(version: str) -> None:
    saved = torch.load(DATA / version / "states.pt", weights_only=True)
    assert len(saved) >= len(RULES) * 6
    for name, state_dict in saved.items():
        rule, state = name.split()
        optimizer = make(rule, parameters(SHAPES), state=state)
        optimizer.load_state_dict(state_dict)
        again = through_file(optimizer.state_dict())
        for number, stored in state_dict["state"].items():
            for key, value in stored.items():
                assert torch.equal(again["state"][number][key], value), (name, number, key)
        run(optimizer, [2])


@pytest.mark.parametrize("version", VERSIONS)
def test_checkpoints_load(version: str, tmp_path: Path) -> None:
    model = nn.Linear(40, 30)
    optimizer = make("adamw8bit", model.parameters())
    loaded = Checkpoints(DATA / version / "checkpoints").load(model, optimizer)
    assert loaded is not None
    assert (loaded.step, loaded.extra) == (2, {"tokens": 640})
    run(optimizer, [2])
    with Checkpoints(tmp_path) as again:
        again.save(3, model, optimizer, blocking=True)


if __name__ == "__main__":
    write(DATA / memopt.__version__)
