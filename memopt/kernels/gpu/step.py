"""Runs the fused step in Triton: one or a few launches over all parameters through tables of addresses."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from memopt.kernels import hashing, step_torch
from memopt.kernels.backend import interpreting
from memopt.kernels.blocks import Blocks, blocks_of
from memopt.kernels.expr import Expr
from memopt.kernels.gpu.printer import load_source
from memopt.kernels.gpu.step_source import step_source
from memopt.kernels.native.cpp import evaluate
from memopt.kernels.native.step_kind import StepKind
from memopt.kernels.quantized import Quantized
from memopt.kernels.request import StepRequest, mark_written, unguarded

PLAIN_BLOCK = 256
TILE = 1024  # elements of a program
WARPS = 4
REGISTERS = 168  # of a thread, at most: left to itself, ptxas aims lower for some kernels and spills one to three
_Pieces = dict[tuple[int, bool], list[int]]  # (width, whole) -> task, first, count, last_of_row of each program


def run(request: StepRequest, *, restart: bool = True) -> dict[str, Tensor]:
    """Carries the step out. Codecs with different block sizes go through the torch implementation.

    Without ``restart`` a new value that is not finite makes its whole block NaN, as quantisers do.
    """
    names = request.update.reductions
    if len(set(request.block_sizes)) > 1:
        ready = unguarded(request)
        nothing = torch.zeros(len(request.params), device=request.params[0].device)
        return dict.fromkeys(names, nothing) if ready is None else step_torch.run(ready)
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, p in enumerate(request.params):
        plain = tuple(s[i].dtype if c is None else c for s, c in zip(request.states, request.codecs, strict=True))  # type: ignore[union-attr]
        groups.setdefault((p.dtype, request.grads[i].dtype, plain), []).append(i)
    sums = torch.zeros(len(request.params), len(names), dtype=torch.float64, device=request.params[0].device)
    for (param, grad, stored), members in groups.items():
        kind = StepKind(request.update, param, grad, stored, request.roundings, request.param_rounding, restart)
        sums[members] = _launch(kind, request, members)
    return {name: sums[:, k].float() for k, name in enumerate(names)}


def options(nvidia: bool) -> dict[str, Any]:
    """What the compiler is told beside the constants; other makers' compilers know no bound on registers."""
    return {"num_warps": WARPS, "enable_fp_fusion": True, **({"maxnreg": REGISTERS} if nvidia else {})}


@functools.lru_cache(maxsize=256)
def _kernel(kind: StepKind, device: torch.device, guarded: bool) -> tuple[Any, list[Expr], Tensor]:
    source, uniforms, tables = step_source(kind, guarded)
    return load_source(source).kernel, uniforms, torch.tensor(tables or [0.0], device=device)


def _launch(kind: StepKind, request: StepRequest, members: list[int]) -> Tensor:
    device = request.params[members[0]].device
    guards = [] if request.guard is None else [request.guard.to(device)]
    kernel, uniforms, tables = _kernel(kind, device, bool(guards))
    block = request.block_sizes[0] if any(request.codecs) else PLAIN_BLOCK
    table, launches = _tables(tuple(_addresses(request, i) for i in members), block, device)
    values = [evaluate(u, request.scalars) for u in uniforms]
    count = len(request.update.reductions)
    totals = torch.zeros(len(members), count, dtype=torch.float64, device=device)
    for (width, whole), pieces, lengths in launches:
        partial = torch.zeros(len(pieces), count, device=device)  # a step that is called off writes none
        kernel[(len(pieces),)](
            table, pieces, tables, partial, *guards, _signed(hashing.step_key(request.seed, request.step)), *values,
            R=max(1, _tile() // width), BLOCK=block, WIDTH=width, WHOLE=whole, INTERPRET=interpreting(),
            **options(device.type == "cuda" and torch.version.hip is None),
        )  # fmt: skip
        if count:
            totals += torch.segment_reduce(partial.double(), "sum", lengths=lengths)
    mark_written(request, members)
    return totals


def _tile() -> int:
    return 64 * TILE if interpreting() else TILE  # the interpreter's time goes by programs


def _signed(x: int) -> int:
    x &= (1 << 64) - 1
    return x - (1 << 64) if x >> 63 else x


def _addresses(request: StepRequest, i: int) -> tuple[Any, ...]:
    """Shape, first index, number and addresses of one parameter: what its row of the table follows from."""
    p = request.params[i]
    pointers: list[int] = [p.data_ptr(), request.grads[i].data_ptr()]
    for stored in request.states:
        state = stored[i]
        if isinstance(state, Quantized):
            pointers += [state.codes.data_ptr(), state.scales.data_ptr()]
        else:
            pointers += [state.data_ptr(), 0]
    return tuple(p.shape), request.offsets[i], _signed(request.numbers[i]), tuple(pointers)


@functools.lru_cache(maxsize=64)
def _tables(
    entries: tuple[tuple[Any, ...], ...], block: int, device: torch.device
) -> tuple[Tensor, list[tuple[tuple[int, bool], Tensor, Tensor]]]:
    """The table of parameters, and for each launch its kind, its programs and how many each parameter has."""
    rows: list[int] = []
    pieces: _Pieces = {}
    for task, (shape, offset, number, pointers) in enumerate(entries):
        blocks = blocks_of(shape, block)
        whole = blocks.per_row if blocks.last == block else blocks.per_row - 1
        rows += [blocks.row_length, blocks.per_row, whole, offset, number, *pointers]
        aligned = all(p % 16 == 0 for p in pointers) and (blocks.rows == 1 or blocks.row_length % 32 == 0)
        _cut(task, blocks, whole, aligned, pieces)
    launches = []
    for key, numbers in pieces.items():
        programs = torch.tensor(numbers, dtype=torch.int32).view(-1, 4)
        lengths = torch.bincount(programs[:, 0], minlength=len(entries))
        launches.append((key, _upload(programs, device), _upload(lengths, device)))
    return _upload(torch.tensor(rows, dtype=torch.int64), device), launches


def _upload(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device, without waiting for what it is doing."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def _cut(task: int, blocks: Blocks, whole_per_row: int, aligned: bool, pieces: _Pieces) -> None:
    """Adds a parameter's programs: R whole blocks each, then what is left of them, then the ragged ends of rows."""

    def add(width: int, whole: bool, spans: Iterator[tuple[int, int]], last_of_row: int) -> None:
        target = pieces.setdefault((width, whole), [])
        for first, count in spans:
            target += [task, first, count, last_of_row]

    if blocks.rows == 0 or blocks.row_length == 0:
        return
    count = blocks.rows * whole_per_row
    width = _width(blocks.block)
    together = max(1, _tile() // width)
    regular = count // together * together if aligned and width == blocks.block else 0
    if regular:
        add(width, True, ((f, together) for f in range(0, regular, together)), 0)
    if count > regular:
        add(width, False, _spans(regular, count, together), 0)
    if whole_per_row < blocks.per_row:
        width = _width(blocks.last)
        add(width, False, _spans(0, blocks.rows, max(1, _tile() // width)), 1)


def _spans(first: int, stop: int, together: int) -> Iterator[tuple[int, int]]:
    return ((f, min(together, stop - f)) for f in range(first, stop, together))


def _width(length: int) -> int:
    return max(16, 1 << (length - 1).bit_length())
