"""Every Triton kernel of the losses compiles for four targets without a GPU and without spilling registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
SCRIPT = r"""
import json, re, subprocess, sys, tempfile, os
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from memopt.kernels.losses import logits_triton, tile_pass, tiles_triton

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32),
           "gfx942": ("hip", "gfx942", 64)}
T16, F32, I64 = "*bf16", "*fp32", "*i64"
everything = dict(HAS_TARGET=True, HAS_BIAS=True, HAS_WEIGHT=True, HAS_SOFT=True, HAS_CAP=True)
tiles_all = dict(HAS_INDEX=True, HAS_BIAS=True, HAS_WEIGHT=True, HAS_CAP=True)
row = dict(x_ptr=T16, x_stride="i32", target_ptr=I64, bias_ptr=F32, weight_ptr=F32, soft_ptr=F32, soft_stride="i32",
           scale_ptr=F32, softcap="fp32", R="i32", V="i32")
tile = dict(hidden_ptr=T16, weight_ptr=T16, index_ptr=I64, target_ptr=I64, bias_ptr=F32, class_weight_ptr=F32,
            scale_ptr=F32, softcap="fp32", M="i32", V="i32", H="i32")
def split(shape):
    return ({k: v for k, v in shape.items() if k[:3] != "num"}, {k: v for k, v in shape.items() if k[:3] == "num"})

# With every option on: what needs most registers.
warps = {"num_warps": logits_triton.WARPS}
blocks, options = split(tile_pass.STATISTICS_TILE)
JOBS = [
    ("statistics", logits_triton.statistics_kernel, {**row, "out_ptr": F32, "argmax_ptr": I64},
     {**everything, "WANT_WEIGHTED": True, "WANT_EXPECTED": True, "BLOCK": logits_triton.BLOCK, "ROWS": 1}, warps),
    ("gradient", logits_triton.gradient_kernel, {**row, "coefficient_ptr": F32, "scale_gradient_ptr": F32},
     {**everything, "WANT_SCALE": True, "BLOCK": logits_triton.BLOCK, "ROWS": 1, "INTERPRET": False}, warps),
    ("tile statistics", tiles_triton.statistics_kernel, {**tile, "out_ptr": F32, "argmax_ptr": I64},
     {**tiles_all, "WANT_WEIGHTED": True, "WANT_EXPECTED": True, "INTERPRET": False, **blocks}, options),
]
blocks, options = split(tile_pass.GRADIENT_TILE)
for owner, own in (("rows", True), ("entries", False)):
    types = {**tile, "coefficient_ptr": F32, "filter_below": "fp32", "out_ptr": F32 if own else T16, "sum_ptr": F32}
    constants = {**tiles_all, "ROWS_OWN": own, "WANT_SUM": True, "SPLIT": own, "INTERPRET": False, **blocks}
    JOBS.append((f"tile gradient, {owner} own", tiles_triton.gradient_kernel, types, constants, options))

def used(kernel, target):
    if target == "gfx942":
        text = kernel.asm["amdgcn"]
        find = lambda key: int(re.search(rf"\.{key}:\s+(\d+)", text).group(1))
        return find("vgpr_count"), find("vgpr_spill_count"), kernel.metadata.shared
    from triton.knobs import nvidia
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        out = subprocess.check_output([nvidia.cuobjdump.path, "-res-usage", file.name], text=True)
    return *(int(re.search(rf"{key}:(\d+)", out).group(1)) for key in ("REG", "STACK")), kernel.metadata.shared

target = sys.argv[1]
result = {}
for name, kernel, types, constants, options in JOBS:
    signature = {a: types.get(a, "constexpr") for a in kernel.arg_names}
    aligned = [a for a, t in types.items() if t[0] == "*" or a in ("H", "x_stride")]
    attrs = {(kernel.arg_names.index(a),): [["tt.divisibility", 16]] for a in aligned}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(k),): v for k, v in constants.items()}, attrs)
    result[name] = used(compile(source, target=GPUTarget(*TARGETS[target]), options=options), target)
print(json.dumps(result))
"""


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_without_spills(target: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"
    run = subprocess.run([sys.executable, "-c", SCRIPT, target], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    used = json.loads(run.stdout)
    print(f"\n{target}: kernel, registers, spilled, shared bytes")  # noqa: T201 (shown by pytest -s)
    for name, numbers in used.items():
        print(f"  {name:28}", *numbers)  # noqa: T201
    assert not [name for name, (_, spilled, _) in used.items() if spilled]
