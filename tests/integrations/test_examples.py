"""Examples run, tiny, as their docstrings say; a library's by its own test, those that a page shows by test_docs.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.integrations import pages


def test_the_plain_loop_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    command = "python -m examples.plain_loop --save-every 2 --width 64 --steps"
    for steps in (4, 6):
        pages.in_fresh_process(tmp_path, pages.run_command, f"{command} {steps}")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["step-000000004", "step-000000006"]


def test_fsdp2_under_torchrun(tmp_path: Path) -> None:
    options = ["-m", "examples.fsdp2", "--steps", "3", "--save-every", "2", "--width", "64"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *options],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(pages.ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=pages.LIMIT_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    assert "step 3  loss" in done.stdout
    assert [path.name for path in (tmp_path / "run-fsdp2").iterdir()] == ["step-000000002"]
