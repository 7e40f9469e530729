"""Every Triton kernel compiled for GPUs that are not there: registers, spills and shared memory.

:func:`jobs` lists them: the fused step for every rule and format, the quantisers, the layers and the losses. The fused
step is one template for rules times formats; the short list has every rule with the codecs that need most registers and
every format with AdamW, the long list (``everything``) the whole product. Nothing here may run in Triton's interpreter.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Any

import torch

from memopt import optim
from memopt.kernels import Update, codec_names, get_codec
from memopt.kernels.native.step_kind import StepKind
from memopt.optim import formats

Numbers = tuple[int, int, int]
BF16, F32, I64 = "*bf16", "*fp32", "*i64"


@dataclass(frozen=True)
class Job:
    """One kernel with its options; ``compile(target)`` gives registers, spills and shared bytes.

    ``kernel`` is the module and function of a kernel that is written, not printed.
    """

    name: str
    compile: Callable[[str], Numbers]
    kernel: str = ""


def jobs(everything: bool = False) -> list[Job]:
    """All kernels; the fused step in every rule and format, or in every combination of the two."""
    return [*step_jobs(everything), *quantizer_jobs(), *layer_jobs(), *loss_jobs()]


def updates() -> list[Update]:
    """Every rule's element-wise update, found in the modules of ``memopt.optim``; by name."""
    found: dict[str, Update] = {}
    for module in pkgutil.walk_packages(optim.__path__, f"{optim.__name__}."):
        for value in vars(importlib.import_module(module.name)).values():
            for one in value.values() if isinstance(value, dict) else [value]:
                if isinstance(one, Update):
                    found[one.name] = one
    rmsprop = importlib.import_module("memopt.optim.rules.rmsprop")
    for centred in (False, True):
        for momentum in (False, True):
            one = rmsprop.variant(centred, momentum)
            found[one.name] = one
    return [found[name] for name in sorted(found)]


def step_jobs(everything: bool) -> Iterator[Job]:
    """The fused step: whole blocks for every kernel, ragged ends of rows for the rule with most formats."""
    for update in updates():
        for name in formats.names():
            for dtype in (torch.float32, torch.bfloat16):
                heaviest = name == "8bit-dynamic" and dtype == torch.bfloat16
                if not (everything or heaviest or update.name == "adamw") or (name != "fp32" and not update.states):
                    continue
                kind = step_kind(update, name, dtype)
                for whole in (True, False):
                    if whole or everything or (update.name == "adamw" and dtype == torch.bfloat16):
                        yield _step_job(f"step {update.name} {name} {str(dtype)[6:]}", kind, whole)


def step_kind(update: Update, name: str, dtype: torch.dtype) -> StepKind:
    """The fused step of a rule whose states are kept in this format."""
    chosen = formats.get_format(name)
    stored: list[Any] = []
    for spec in update.states:
        codec = chosen.codec(spec)
        stored.append(codec if codec is not None else getattr(chosen, "dtype", torch.float32))
    roundings = tuple(chosen.rounding(spec) for spec in update.states)
    return StepKind(
        update, dtype, dtype, tuple(stored), roundings, "nearest" if dtype == torch.float32 else "stochastic"
    )


def _step_job(name: str, kind: StepKind, whole: bool) -> Job:
    def compile_(target: str) -> Numbers:
        from memopt.kernels.gpu.targets import compile_step

        block = max((s.block for s in kind.stored if not isinstance(s, torch.dtype)), default=256)
        return compile_step(kind, target, block if whole else 2 * block, whole)

    return Job(f"{name}, {'whole' if whole else 'ragged'}", compile_)


def quantizer_jobs() -> Iterator[Job]:
    """Every codec both ways, with stochastic rounding, which needs more than nearest."""
    from memopt.kernels.gpu.quantize import DECODE, ENCODE

    for name in codec_names():
        for update in (ENCODE, DECODE):
            kind = StepKind(update, torch.bfloat16, torch.bfloat16, (get_codec(name),), ("stochastic",), "nearest")
            yield _step_job(f"{update.name} {name}", kind, True)


def layer_jobs() -> Iterator[Job]:
    """Norms of 4096 and 8192 elements, gated activations, masks, dropout, rotary embedding."""
    from memopt.kernels.layers import gated_triton, masks_triton, norms_triton, rotary_triton

    counts = {"N": "i32", "R": "i32", "D": "i32", "COUNT": "i32", "B": "i32", "C": "i32"}
    for kind, number in gated_triton.KINDS.items():
        for direction in ("forward", "backward"):
            kernel = getattr(gated_triton, f"{direction}_kernel")
            constants = {"KIND": number, "BLOCK": gated_triton.BLOCK, "INTERPRET": False}
            yield _job(f"{kind} gated {direction}", kernel, counts, constants, num_warps=gated_triton.WARPS)
    flags = {"HAS_WEIGHT": True, "HAS_BIAS": True, "CENTRED": True, "INTERPRET": False}
    of_rows = {"eps": "fp32", **{f"{part}_ptr": F32 for part in ("mean", "inverse", "sums")}}
    for D, multiples in ((norms_triton.LONGEST_ODD, ()), (norms_triton.LONGEST, ("D",))):
        shape = norms_triton.shape_of(D)
        constants = {**flags, "BLOCK": shape["BLOCK"]}
        yield _job(
            f"norm {D} forward", norms_triton.forward_kernel, {**counts, **of_rows}, {**constants, "ROWS": 1},
            multiples, num_warps=shape["num_warps"],
        )  # fmt: skip
        for keep in (False, True):
            yield _job(
                f"norm {D} backward{', output kept' * keep}", norms_triton.backward_kernel,
                {**counts, **of_rows, "ROWS": "i32"}, {**constants, "KEEP_OUTPUT": keep}, multiples,
                num_warps=shape["num_warps"],
            )  # fmt: skip
    block, warps = {"BLOCK": masks_triton.BLOCK, "INTERPRET": False}, {"num_warps": masks_triton.WARPS}
    for name, packs, is_flags in (
        ("pack", True, True), ("unpack", False, True), ("relu", True, False), ("masked", False, False),
    ):  # fmt: skip
        kind = "*u8" if is_flags else BF16
        types = {**counts, "scale": "fp32", "x_ptr": kind, "y_ptr": kind, "packed_ptr": "*u8"}
        constants = {**block, "PACKS": packs, "IS_FLAGS": is_flags}
        yield _job(f"mask {name}", masks_triton.bits_kernel, types, constants, **warps)
    types = {**counts, "scale": "fp32", "key": "i64", "below": "i64"}
    yield _job("dropout", masks_triton.dropout_kernel, types, {**block, "BLOCK": 1024}, **warps)
    strides = {f"{name}_{letter}": "i32" for name in ("x", "cos", "sin") for letter in "abcd"}
    types = {**counts, **strides, "second": "i32", "sign": "fp32", "cos_ptr": F32, "sin_ptr": F32}
    constants = {"BLOCK": 64, "ROWS": 16, "INTERPRET": False}
    yield _job("rotary", rotary_triton.rotate_kernel, types, constants, num_warps=rotary_triton.WARPS)


def loss_jobs() -> Iterator[Job]:
    """The loss kernels with every option on, which is what needs most registers."""
    from memopt.kernels.losses import logits_triton, pairs_triton, tile_pass, tiles_triton

    inputs = dict.fromkeys(("bias_ptr", "weight_ptr", "soft_ptr", "scale_ptr", "class_weight_ptr", "out_ptr"), F32)
    inputs |= dict.fromkeys(("target_ptr", "index_ptr", "order_ptr", "argmax_ptr"), I64)
    inputs |= dict.fromkeys(("x_stride", "soft_stride", "R", "V", "M", "H"), "i32")
    inputs |= {"softcap": "fp32", "filter_below": "fp32", "coefficient_ptr": F32, "scale_gradient_ptr": F32}
    on = {f"HAS_{flag}": True for flag in ("TARGET", "INDEX", "ORDER", "BIAS", "WEIGHT", "SOFT", "CAP")}
    on |= {f"WANT_{flag}": True for flag in ("WEIGHTED", "EXPECTED", "SCALE", "SUM")}
    on |= {"BLOCK": logits_triton.BLOCK, "ROWS": 1, "INTERPRET": False}
    also = ("x_stride", "H")
    for name in ("statistics", "gradient"):
        kernel = getattr(logits_triton, f"{name}_kernel")
        yield _job(f"logit {name}", kernel, inputs, on, aligned=also, num_warps=logits_triton.WARPS)
    tiled = {**inputs, "weight_ptr": BF16, "sum_ptr": F32}
    constants, options = _split(tile_pass.STATISTICS_TILE)
    kernel = tiles_triton.statistics_kernel
    yield _job("tile statistics", kernel, tiled, {**on, **constants}, aligned=also, **options)
    constants, options = _split(tile_pass.GRADIENT_TILE)
    for owner, own in (("rows", True), ("entries", False)):
        values = {**on, **constants, "ROWS_OWN": own, "SPLIT": own}
        kernel = tiles_triton.gradient_kernel
        yield _job(f"tile gradient, {owner} own", kernel, tiled, values, aligned=also, **options)
    inputs |= {"highest_ptr": F32, "total_ptr": F32, "row_ptr": F32, "column_ptr": F32, "C": "i32"}
    constants, options = _split(pairs_triton.COLUMN_TILE)
    yield _job("pairs columns", pairs_triton.column_kernel, inputs, constants, aligned=also, **options)
    values = {**on, "BLOCK": pairs_triton.GRADIENT_BLOCK}
    options = {"num_warps": pairs_triton.GRADIENT_WARPS}
    yield _job("pairs gradient", pairs_triton.gradient_kernel, inputs, values, aligned=also, **options)


def _split(tile: dict[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """Constants of the kernel, and options of the compiler."""
    return ({k: v for k, v in tile.items() if k[:3] != "num"}, {k: v for k, v in tile.items() if k[:3] == "num"})


def _job(
    name: str,
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    aligned: tuple[str, ...] = (),
    **options: int,
) -> Job:
    """Of what ``types`` and ``constants`` name, a kernel takes what it has; a pointer that has no type is bfloat16."""

    def compile_(target: str) -> Numbers:
        from memopt.kernels.gpu.targets import compile_for

        names = kernel.arg_names
        values = {key: value for key, value in constants.items() if key in names}
        kinds = {key: types.get(key, BF16) for key in names if key not in values}
        return compile_for(kernel, kinds, values, target, aligned=aligned, **options)

    return Job(name, compile_, f"{kernel.__module__}.{kernel.__name__}")


def measure(
    everything: bool = False,
    pairs: Sequence[tuple[str, str]] | None = None,
    *,
    cold: bool = True,
    processes: int = 2,
) -> list[dict[str, Any]]:
    """One row for each kernel and target.

    Args:
        everything: as in :func:`jobs`.
        pairs: names and targets; all of them unless given.
        cold: compile all anew, instead of using Triton's cache.
        processes: how many compile side by side.
    """
    from memopt.kernels.gpu.targets import TARGETS

    numbers = {job.name: number for number, job in enumerate(jobs(everything))}
    if pairs is None:
        pairs = [(name, target) for name in numbers for target in TARGETS]
    work = [(everything, numbers[name], target) for name, target in pairs]
    with tempfile.TemporaryDirectory() as cache:
        environment = {"TRITON_DEFAULT_FP_FUSION": "1", "OMP_NUM_THREADS": "1"}
        if cold:
            environment["TRITON_CACHE_DIR"] = cache
        context = get_context("spawn")
        with ProcessPoolExecutor(processes, context, _begin, (environment,)) as pool:
            return list(pool.map(_one, work, chunksize=4))


def _begin(environment: dict[str, str]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)


def _one(work: tuple[bool, int, str]) -> dict[str, Any]:
    from memopt.kernels.gpu.targets import Usage

    everything, number, target = work
    job = _cached_jobs(everything)[number]
    started = time.process_time()
    usage = Usage(job.name, target, *job.compile(target))
    return {**asdict(usage), "CPU s": round(time.process_time() - started, 2)}


_JOBS: dict[bool, list[Job]] = {}


def _cached_jobs(everything: bool) -> list[Job]:
    if everything not in _JOBS:
        _JOBS[everything] = jobs(everything)
    return _JOBS[everything]
