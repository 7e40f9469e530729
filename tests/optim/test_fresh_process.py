"""A state dict saved at any step and loaded in a fresh process resumes bitwise, for every rule and format.

One process resumes all combinations: starting Python and importing torch costs more than all the steps.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from memopt.optim.formats import names
from tests.optim.every_rule import PAIRS, made
from tests.optim.training import parameters, run

SHAPES = ((20, 300), (97, 101), (260, 257), (8,))  # whole and ragged rows, flat, rank-1 scales, small
SAVED = (0, 1, 3)
STEPS = 5


def combinations() -> list[tuple[str, str, int]]:
    """Every rule in every format, at one of the steps; each rule and each format meets every step."""
    return [(rule, state, SAVED[(i + i // len(names())) % len(SAVED)]) for i, (rule, state) in enumerate(PAIRS)]


def resume_all(folder: Path) -> None:
    """The fresh process's part."""
    for rule, state, saved in combinations():
        kept = torch.load(folder / f"{rule}-{state}.pt", weights_only=True)
        params = [torch.nn.Parameter(p) for p in kept["params"]]
        optimizer = made(rule, params, state=state)
        optimizer.load_state_dict(kept["optimizer"])
        run(optimizer, range(saved, STEPS))
        for number, (p, expected) in enumerate(zip(params, kept["expected"], strict=True)):
            assert torch.equal(p.detach(), expected), f"{rule} {state} saved at step {saved}: parameter {number}"


def test_every_rule_and_format_resumes_in_a_fresh_process(tmp_path: Path) -> None:
    for rule, state, saved in combinations():
        params = parameters(SHAPES)
        optimizer = made(rule, params, state=state)
        run(optimizer, saved)
        kept: dict[str, Any] = {"params": [p.detach().clone() for p in params]}
        file = tmp_path / f"{rule}-{state}.pt"
        torch.save({"optimizer": optimizer.state_dict()}, file)
        kept |= torch.load(file, weights_only=True)
        run(optimizer, range(saved, STEPS))
        torch.save({**kept, "expected": [p.detach() for p in params]}, file)
    call = "import sys, pathlib, tests.optim.test_fresh_process as t; t.resume_all(pathlib.Path(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", call, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
