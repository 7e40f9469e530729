"""CP-SAT (ortools), in a process of its own: proofs on irregular problems of up to a few hundred buffers."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

from memopt.planner.placement.task import Method, Task

_WORKER = Path(__file__).parent.parent / "workers" / "cpsat.py"
_LARGEST_PAIRS = 200_000
_SHORTEST = 0.5  # seconds; starting the process takes about as long
_GRACE = 15.0  # seconds that building the model and ending may take beyond the solver's limit


def run(task: Task) -> None:
    """One solve from the best placement so far; every answer passes the driver's check. Not reproducible by seed."""
    part = task.part
    if sum(map(len, part.neighbours)) > 2 * _LARGEST_PAIRS or task.seconds_left() < _SHORTEST:
        return
    problem = {
        "low": part.low,
        "high": part.high,
        "size": part.size,
        "capacity": task.peak - 1 if task.minimise else task.goal,
        "lower": task.lower,
        "hint": task.offsets,
        "minimise": task.minimise,
        "seconds": task.seconds_left(),
        "seed": task.seed,
        "workers": min(8, os.cpu_count() or 1),
    }
    try:
        process = subprocess.run(
            [sys.executable, str(_WORKER)],
            input=json.dumps(problem),
            capture_output=True,
            text=True,
            timeout=task.seconds_left() + _GRACE,
            check=True,
        )
        answer = json.loads(process.stdout)
    except (subprocess.SubprocessError, OSError, ValueError) as error:
        task.remarks.append(f"CP-SAT gave no answer ({type(error).__name__})")
        return
    task.prove(answer["lower"], "CP-SAT exhausted the smaller arenas")
    if answer["offsets"]:
        task.offer(answer["offsets"], "CP-SAT")


def missing() -> str | None:
    """The package that this method needs and this machine lacks."""
    return None if importlib.util.find_spec("ortools") else "ortools"


METHOD = Method("cpsat", rank=2, run=run, missing=missing)
