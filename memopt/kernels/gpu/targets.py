"""Compiles printed kernels for GPUs that are not there, and tells what they use.

Nothing of a GPU or its driver is needed; the process must not run Triton's interpreter.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from memopt.kernels import math as km
from memopt.kernels.codecs import codec_names, get_codec
from memopt.kernels.gpu.printer import load_source
from memopt.kernels.gpu.quantize import DECODE, ENCODE
from memopt.kernels.gpu.step import TILE, WARPS
from memopt.kernels.gpu.step_source import step_source
from memopt.kernels.native.step_source import StepKind
from memopt.kernels.update import State, Update

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
    kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], target: str, **options: Any
) -> tuple[int, int, int]:
    """Registers, spills and shared bytes of a kernel whose pointers are multiples of 16."""
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    place = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    aligned = {place[name]: [["tt.divisibility", 16]] for name, kind in types.items() if kind.startswith("*")}
    source = ASTSource(kernel, signature, {place[k]: v for k, v in constants.items()}, aligned)
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


def compile_step(kind: StepKind, target: str, width: int, whole: bool) -> tuple[int, int, int]:
    """The same of the step's kernel for tiles of this width."""
    source, uniforms, _ = step_source(kind)
    types = {"table": "*i64", "pieces": "*i32", "tables": "*fp32", "sums": "*fp32", "step_key": "i64"}
    types.update({f"U{i}": "fp32" for i in range(len(uniforms))})
    block = next((s.block for s in kind.stored if not isinstance(s, torch.dtype)), width)
    constants = {"R": max(1, TILE // width), "BLOCK": block, "WIDTH": width, "WHOLE": whole, "INTERPRET": False}
    return compile_for(load_source(source).kernel, types, constants, target, num_warps=WARPS, enable_fp_fusion=True)


def _adamw(p: Any, g: Any, states: tuple[Any, ...], s: SimpleNamespace) -> tuple[Any, tuple[Any, ...]]:
    m = s.beta1 * states[0] + (1 - s.beta1) * g
    v = s.beta2 * states[1] + (1 - s.beta2) * g * g
    return p * s.shrink - s.lr * m / (km.sqrt(v) + s.eps), (m, v)


ADAMW = Update("adamw", (State("m"), State("v", signed=False)), ("beta1", "beta2", "shrink", "lr", "eps"), _adamw)
_PAIRS = (("sq127", "root4"), ("sq15", "sqrt"), ("dynamic8", "dynamic8u"), ("de4", "linear4"))


def step_kinds() -> Iterator[tuple[str, StepKind]]:
    """AdamW in fp32 and bf16 with plain states and every pair of codecs."""
    for dtype in (torch.float32, torch.bfloat16):
        rounding = "nearest" if dtype == torch.float32 else "stochastic"
        yield f"AdamW {dtype} plain", StepKind(ADAMW, dtype, dtype, (dtype, dtype), (rounding,) * 2, rounding)
        for names in _PAIRS:
            codecs = tuple(get_codec(name) for name in names)
            roundings = tuple(codec.rounding for codec in codecs)
            yield f"AdamW {dtype} {'+'.join(names)}", StepKind(ADAMW, dtype, dtype, codecs, roundings, rounding)


def quantize_kinds() -> Iterator[tuple[str, StepKind]]:
    """Every codec both ways, with stochastic rounding, which needs more than nearest."""
    for name in codec_names():
        for update in (ENCODE, DECODE):
            kind = StepKind(update, torch.bfloat16, torch.bfloat16, (get_codec(name),), ("stochastic",), "nearest")
            yield f"{update.name} {name}", kind


def usages(target: str, kinds: Iterator[tuple[str, StepKind]]) -> Iterator[Usage]:
    """Compiles each kind for whole blocks and for the ragged ends of rows."""
    for name, kind in kinds:
        block = next((s.block for s in kind.stored if not isinstance(s, torch.dtype)), 256)
        yield Usage(f"{name}, whole", target, *compile_step(kind, target, block, True))
        yield Usage(f"{name}, ragged", target, *compile_step(kind, target, 2 * block, False))
