"""Runs the fused step on the CPU: groups parameters by dtype, builds the kernel, hands it a table of addresses."""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from memopt import native_build
from memopt.kernels import hashing, step_torch
from memopt.kernels.native.cpp import evaluate
from memopt.kernels.native.step_kind import GRAD_SCALE, StepKind
from memopt.kernels.native.step_source import StepSource, step_source
from memopt.kernels.quantized import Quantized
from memopt.kernels.request import StepRequest, Stored, mark_written

_Types = tuple[torch.dtype, torch.dtype, tuple[Any, ...]]
FLAGS = ("-fschedule-insns", "-falign-loops=64")  # what waits for each other stands further apart; loops begin a line
_LEAST, _LARGEST = torch.finfo(torch.float32).smallest_normal, torch.finfo(torch.float32).max
_SMALL = 2.0**-64  # numbers that others are divided by keep as far from 0 and infinity
_GRAD = 6  # the place of the gradient's address in a row of the table


@dataclass(frozen=True)
class _Kernel:
    """A compiled step and its source, which has the expressions for its numbers."""

    kind: StepKind
    function: Callable[..., None]
    source: StepSource


def run(request: StepRequest) -> dict[str, Tensor]:
    """Carries the step out; the torch implementation does all of it where one of its kernels cannot be built."""
    groups: dict[_Types, list[int]] = {}
    for i in range(len(request.params)):
        groups.setdefault(_types(request, i), []).append(i)
    kernels = [_kernel(_kind(request, types)) for types in groups]
    if None in kernels:
        return step_torch.run(request)
    request, late = _in_order(request)
    sums = torch.zeros(len(request.params), len(request.update.reductions), dtype=torch.float64)
    for kernel, members in zip(kernels, groups.values(), strict=True):
        assert kernel is not None
        table = array("q", [field for i in members for field in _row(request, i)])
        key = hashing.step_key(request.seed, request.step)
        sums[members] = _call(kernel, table, len(members), request.scalars, key, len(request.update.reductions))
        mark_written(request, members)
    for tensor, copy in late:
        tensor.copy_(copy)
    return {name: sums[:, k].float() for k, name in enumerate(request.update.reductions)}


class Launch:
    """A checked step of which only the gradients and the numbers change from call to call; it holds no tensor.

    Args:
        request: a checked step on contiguous tensors, alike in their types.
        kernel: the kernel for it.
        params: whose memory the request's parameters are.
        memory: the tensors of the states: for each state, for each parameter, its codes and scales, or the plain one.
    """

    def __init__(self, request: StepRequest, kernel: _Kernel, params: Sequence[Tensor], memory: Sequence[Tensor]):
        self._kernel, self._names, self._count = kernel, request.update.reductions, len(params)
        rows = [_row(request, i) for i in range(self._count)]
        self._width = len(rows[0])
        self._table = array("q", [field for row in rows for field in row])
        self._addresses = [t.data_ptr() for t in (*params, *memory)]
        self._param_type, self._grad_type = params[0].dtype, request.grads[0].dtype
        self._shapes = [p.shape for p in params]
        *states, param = request.update.writes()
        self._written = [param] * self._count
        for stored, written in zip(request.states, states, strict=True):
            self._written += [written] * (self._count * (2 if isinstance(stored[0], Quantized) else 1))

    def run(
        self,
        params: Sequence[Tensor],
        memory: Sequence[Tensor],
        grads: Sequence[Tensor],
        scalars: Mapping[str, float],
        seed: int,
        step: int,
    ) -> dict[str, Tensor] | None:
        """Carries the step out and returns its reductions; None, with nothing done, where anything but values is no
        longer as it was prepared."""
        held = [*params, *memory]
        if (
            [t.data_ptr() for t in held] != self._addresses
            or [p.shape for p in params] != self._shapes
            or not all(p.dtype is self._param_type and p.is_contiguous() for p in params)
            or [g.shape for g in grads] != self._shapes
            or not all(g.dtype is self._grad_type and g.is_contiguous() and g.is_cpu for g in grads)
        ):
            return None
        self._table[_GRAD :: self._width] = array("q", [g.data_ptr() for g in grads])
        key = hashing.step_key(seed, step)
        sums = _call(self._kernel, self._table, self._count, scalars, key, len(self._names))
        torch.autograd.graph.increment_version([t for t, w in zip(held, self._written, strict=True) if w])
        return {name: sums[:, k].float() for k, name in enumerate(self._names)}


def prepare(request: StepRequest, params: Sequence[Tensor], memory: Sequence[Tensor]) -> Launch | None:
    """What repeats a checked step; None where it must go the long way every time."""
    types = {_types(request, i) for i in range(len(request.params))}
    tensors = [*params, *request.grads, *memory]
    if len(types) != 1 or not all(t.is_contiguous() and t.is_cpu for t in tensors):
        return None
    kernel = _kernel(_kind(request, types.pop()))
    return None if kernel is None else Launch(request, kernel, params, memory)


def _types(request: StepRequest, i: int) -> _Types:
    stored = tuple(s[i].dtype if c is None else c for s, c in zip(request.states, request.codecs, strict=True))  # type: ignore[union-attr]
    return request.params[i].dtype, request.grads[i].dtype, stored


def _kind(request: StepRequest, types: _Types) -> StepKind:
    graded = request.scalars.get(GRAD_SCALE, 1.0) != 1.0
    return StepKind(request.update, *types, request.roundings, request.param_rounding, graded=graded)


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


def _kernel(kind: StepKind) -> _Kernel | None:
    return _built(kind, native_build.cpu_flags())


@functools.lru_cache(maxsize=256)
def _built(kind: StepKind, flags: tuple[str, ...]) -> _Kernel | None:
    """The kernel of a kind; ``flags`` are those in force, which the user may change between steps."""
    source = step_source(kind)
    library = native_build.build(f"step-{kind.update.name}", source.text, FLAGS)
    if library is None:
        return None
    function = library.run
    function.argtypes = [
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_uint64,
        ctypes.c_int,
    ]
    function.restype = None
    return _Kernel(kind, function, source)


def _call(
    kernel: _Kernel, table: array[int], count: int, scalars: Mapping[str, float], key: int, reductions: int
) -> Tensor:
    kernel, values = _fitting(kernel, scalars)
    sums = torch.zeros(count, reductions, dtype=torch.float64)
    kernel.function(
        table.buffer_info()[0], count, values.buffer_info()[0], sums.data_ptr(), key, native_build.threads()
    )
    return sums


def _fitting(kernel: _Kernel, scalars: Mapping[str, float]) -> tuple[_Kernel, array[float]]:
    """The kernel for these numbers, one that moves them less where they ask for it, and its uniform values."""
    graded = scalars.get(GRAD_SCALE, 1.0) != 1.0
    if graded is not kernel.kind.graded:
        return _fitting(_variant(kernel, graded=graded), scalars)
    if all(_SMALL < evaluate(number, scalars) < 1 / _SMALL for number in kernel.source.positive):
        values = [evaluate(number, scalars) for number in kernel.source.uniforms] or [0.0]
        ordinary = all(value == 0 or _LEAST <= abs(value) <= _LARGEST for value in values)
        if not kernel.kind.scaled or (ordinary and all(values[i] >= 0 for i in kernel.source.gains)):
            return kernel, array("f", values)
    return _fitting(_variant(kernel, scaled=False), scalars)


def _variant(kernel: _Kernel, **changes: Any) -> _Kernel:
    other = _kernel(replace(kernel.kind, **changes))
    assert other is not None  # this machine has compiled the first one
    return other


def _row(request: StepRequest, i: int) -> list[int]:
    """A ``Task`` of step.hpp."""
    p = request.params[i]
    flat = p.dim() < 2
    rows, cols = (1, p.numel()) if flat else (p.shape[0], p.numel() // max(p.shape[0], 1))
    if cols == 0:
        rows = 0
    number = request.numbers[i] & hashing.MASK64
    fields = [rows, max(cols, 1), int(flat), request.offsets[i], number - (1 << 64) if number >> 63 else number]
    fields += [p.data_ptr(), request.grads[i].data_ptr()]
    for stored in request.states:
        fields += _addresses(stored[i])
    return fields if request.states else [*fields, 0, 0]


def _addresses(state: Stored) -> tuple[int, int]:
    if isinstance(state, Quantized):
        return state.codes.data_ptr(), state.scales.data_ptr()
    return state.data_ptr(), 0
