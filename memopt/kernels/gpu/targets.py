"""Compiles Triton kernels for GPUs that are not there, and tells what they use.

Nothing of a GPU or its driver is needed; the process must not run Triton's interpreter.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from memopt.kernels.gpu.printer import load_source
from memopt.kernels.gpu.step import TILE, options
from memopt.kernels.gpu.step_source import step_source
from memopt.kernels.native.step_kind import StepKind

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel needs: registers per thread, bytes or registers spilled, shared memory in bytes."""

    kernel: str
    target: str
    registers: int
    spilled: int
    shared_bytes: int


def compile_for(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    target: str,
    *,
    aligned: Sequence[str] = (),
    **options: Any,
) -> tuple[int, int, int]:
    """Registers, spills and shared bytes of a kernel.

    Args:
        kernel: a ``triton.jit`` function.
        types: Triton's type of each argument, such as ``"*bf16"`` or ``"i32"``; the rest are constants.
        constants: the values of the compile-time arguments.
        target: a key of ``TARGETS``.
        aligned: numbers that are multiples of 16; pointers always are.
        options: of the compiler: ``num_warps``, ``num_stages``.
    """
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    place = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    multiples = [name for name, kind in types.items() if kind.startswith("*") or name in aligned]
    hints = {place[name]: [["tt.divisibility", 16]] for name in multiples}
    source = ASTSource(kernel, signature, {place[k]: v for k, v in constants.items()}, hints)
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    shared = int(compiled.metadata.shared)
    if TARGETS[target].backend == "hip":
        text = compiled.asm["amdgcn"]
        found = [re.search(rf"\.{key}:\s+(\d+)", text) for key in ("vgpr_count", "vgpr_spill_count")]
    else:
        from triton.knobs import nvidia

        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [nvidia.cuobjdump.path, "-res-usage", file.name]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = [re.search(rf"{key}:(\d+)", text) for key in ("REG", "STACK")]
    numbers = [int(match.group(1)) for match in found if match]
    return numbers[0], numbers[1], shared


def compile_step(
    kind: StepKind, target: str, width: int, whole: bool, *, guarded: bool = False
) -> tuple[int, int, int]:
    """The same of the step's kernel for tiles of this width."""
    source, uniforms, _ = step_source(kind, guarded)
    types = {"table": "*i64", "pieces": "*i32", "tables": "*fp32", "sums": "*fp32", "step_key": "i64"}
    types |= {"guard": "*fp32"} if guarded else {}
    types.update({f"U{i}": "fp32" for i in range(len(uniforms))})
    block = next((s.block for s in kind.stored if not isinstance(s, torch.dtype)), width)
    constants = {"R": max(1, TILE // width), "BLOCK": block, "WIDTH": width, "WHOLE": whole, "INTERPRET": False}
    return compile_for(
        load_source(source).kernel, types, constants, target, **options(TARGETS[target].backend == "cuda")
    )
