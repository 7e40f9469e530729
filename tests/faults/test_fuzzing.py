"""What fuzzing found stays found, and a few seconds of it in every run; ``python -m tests.faults.fuzzing`` goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.fuzzing import CRASHES

SECONDS = 5
KEPT = sorted(path for path in CRASHES.iterdir() if path.suffix != ".md")
REPLAY = """
import sys, tempfile
from pathlib import Path
from tests.faults.fuzzing import targets
known = targets()
with tempfile.TemporaryDirectory() as folder:
    for name in sys.argv[1:]:
        known[Path(name).name.split("-")[0]].consume(Path(name).read_bytes(), Path(folder))
"""


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=root, capture_output=True, text=True, timeout=300
    )


def test_crashes_that_were_found_stay_mended() -> None:
    assert len(KEPT) >= 7
    done = python("-c", REPLAY, *map(str, KEPT))
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_format_for_a_few_seconds() -> None:
    pytest.importorskip("atheris")
    before = set(CRASHES.iterdir())
    done = python("-m", "tests.faults.fuzzing", "all", str(SECONDS))
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(CRASHES.iterdir()) == before
