"""The printed Triton kernels compile for four targets without a GPU and without spilling registers.

``python -m benchmarks.kernels --targets`` compiles and prints all of them; here is what each family needs most.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

SCRIPT = r"""
import dataclasses, json, sys
from memopt.kernels.gpu.targets import quantize_kinds, step_kinds, usages

wanted = ("AdamW torch.float32 sq127+root4", "AdamW torch.bfloat16 sq15+sqrt", "quantize dynamic8", "dequantize nf4")
kinds = [(name, kind) for name, kind in [*step_kinds(), *quantize_kinds()] if name in wanted]
assert len(kinds) == len(wanted)
print(json.dumps([dataclasses.asdict(usage) for usage in usages(sys.argv[1], iter(kinds))]))
"""


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_kernels_compile_without_spills(target: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", SCRIPT, target], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    rows = json.loads(run.stdout)
    for row in rows:
        print("{target:7} {kernel:42} {registers:4} registers {spilled:3} spilled {shared_bytes:6} B".format(**row))  # noqa: T201
    assert not [row["kernel"] for row in rows if row["spilled"]]
