"""Every Triton kernel compiles for four targets without a GPU and without spilling registers.

``python -m benchmarks.kernels --targets`` does the same from a cold cache and prints the table, ``--all`` also every
optimizer rule in every format; both fail where one spills.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import memopt.kernels
from benchmarks.gpu_targets import jobs, measure, step_kind
from memopt.kernels.gpu.targets import compile_step
from memopt.optim.rules.adamw import ADAMW

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_without_spills(target: str) -> None:
    names = [job.name for job in jobs()]
    rows = measure(pairs=[(name, target) for name in names], cold=False, processes=1)
    assert [row["kernel"] for row in rows] == names
    assert not [row["kernel"] for row in rows if row["spilled"]]
    assert all(row["registers"] > 0 for row in rows)


def test_a_step_under_a_grad_scaler_compiles_too() -> None:
    for target, whole in (("sm_90", True), ("gfx942", False)):
        kind = step_kind(ADAMW, "8bit", torch.bfloat16)
        _, spilled, _ = compile_step(kind, target, 256 if whole else 512, whole, guarded=True)
        assert not spilled


def test_every_kernel_is_listed() -> None:
    """Each ``..._kernel`` that a file of the room defines is the kernel of some job."""
    listed, folder = {job.kernel for job in jobs()}, Path(memopt.kernels.__file__).parent
    for path in folder.rglob("*_triton.py"):
        module = ".".join(["memopt.kernels", *path.relative_to(folder).with_suffix("").parts])
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                assert f"{module}.{node.name}" in listed, (
                    f"add a job for {module}.{node.name} to benchmarks.gpu_targets"
                )
