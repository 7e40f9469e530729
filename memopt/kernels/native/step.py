"""Runs the fused step on the CPU: groups parameters by dtype, builds the kernel, hands it a table of addresses."""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from memopt import native_build
from memopt.kernels import hashing, step_torch
from memopt.kernels.expr import Expr
from memopt.kernels.native.cpp import evaluate
from memopt.kernels.native.step_source import StepKind, step_source
from memopt.kernels.quantized import Quantized
from memopt.kernels.request import StepRequest, mark_written

_Kernel = tuple[Callable[..., None], list[Expr]]


def run(request: StepRequest) -> dict[str, Tensor]:
    """Carries the step out; the torch implementation does it where the kernel cannot be built."""
    request, late = _in_order(request)
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, p in enumerate(request.params):
        plain = tuple(s[i].dtype if c is None else c for s, c in zip(request.states, request.codecs, strict=True))  # type: ignore[union-attr]
        groups.setdefault((p.dtype, request.grads[i].dtype, plain), []).append(i)
    sums = torch.zeros(len(request.params), len(request.update.reductions), dtype=torch.float64)
    for (param, grad, stored), members in groups.items():
        kind = StepKind(request.update, param, grad, stored, request.roundings, request.param_rounding)
        kernel = _kernel(kind)
        if kernel is None:
            totals = step_torch.run(request)
            break
        sums[members] = _launch(kernel, request, members)
    else:
        totals = {name: sums[:, k].float() for k, name in enumerate(request.update.reductions)}
    for tensor, copy in late:
        tensor.copy_(copy)
    return totals


def _in_order(request: StepRequest) -> tuple[StepRequest, list[tuple[Tensor, Tensor]]]:
    """The request on memory that lies in order, which is what the kernel reads: copies of all that does not.

    Returns the request and the pairs (tensor, its copy) to write back. A broadcast tensor is never written.
    """
    late: list[tuple[Tensor, Tensor]] = []

    def ordered(stored: Any, written: bool) -> Any:
        if isinstance(stored, Quantized) or stored.is_contiguous():
            return stored
        copy = stored.detach().contiguous()
        if written and 0 not in stored.stride():
            late.append((stored.detach(), copy))
        return copy

    lists = [request.params, request.grads, *request.states]
    made = [[ordered(t, which != 1) for t in tensors] for which, tensors in enumerate(lists)]
    if all(a is b for old, new in zip(lists, made, strict=True) for a, b in zip(old, new, strict=True)):
        return request, late
    return replace(request, params=made[0], grads=made[1], states=made[2:]), late


@functools.lru_cache(maxsize=256)
def _kernel(kind: StepKind) -> _Kernel | None:
    source, uniforms = step_source(kind)
    library = native_build.build(f"step-{kind.update.name}", source)
    if library is None:
        return None
    function = library.run
    function.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
    function.restype = None
    return function, uniforms


def _launch(kernel: _Kernel, request: StepRequest, members: list[int]) -> Tensor:
    function, uniforms = kernel
    values = array("f", [evaluate(u, request.scalars) for u in uniforms] or [0.0])
    fields: list[int] = []
    for i in members:
        fields += _task(request, i)
    table = array("q", fields)
    sums = torch.zeros(len(members), len(request.update.reductions), dtype=torch.float64)
    function(table.buffer_info()[0], len(members), values.buffer_info()[0], sums.data_ptr(), native_build.threads())
    mark_written(request, members)
    return sums


def _task(request: StepRequest, i: int) -> list[int]:
    p = request.params[i]
    flat = p.dim() < 2
    rows, cols = (1, p.numel()) if flat else (p.shape[0], p.numel() // max(p.shape[0], 1))
    if cols == 0:
        rows = 0
    key = hashing.base_key(request.seed, request.step, request.numbers[i])
    fields = [rows, max(cols, 1), int(flat), request.offsets[i], key - (1 << 64) if key >> 63 else key]
    fields += [p.data_ptr(), request.grads[i].data_ptr()]
    for stored in request.states:
        state = stored[i]
        if isinstance(state, Quantized):
            fields += [state.codes.data_ptr(), state.scales.data_ptr()]
        else:
            fields += [state.data_ptr(), 0]
    if not request.states:
        fields += [0, 0]
    return fields
