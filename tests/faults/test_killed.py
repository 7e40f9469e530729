"""A run killed at random moments resumes bitwise; ``python -m tests.faults.killed 30`` does it thirty times."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_killed_runs_resume_bitwise() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.killed", "8"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    *kills, total = done.stdout.splitlines()
    assert len(kills) == 8
    assert int(total.split("; ")[1].split()[0]) > 0
