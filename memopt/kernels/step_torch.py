"""The oracle of the fused step: plain torch, some rows at a time so that temporaries stay small."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace

import torch
from torch import Tensor

from memopt.kernels import hashing
from memopt.kernels.blocks import blocks_of
from memopt.kernels.quantize_torch import decode_rows, encode_rows
from memopt.kernels.request import StepRequest
from memopt.kernels.strided import cut

CHUNK = 1 << 20  # elements handled at once


def run(request: StepRequest) -> dict[str, Tensor]:
    """Carries the step out; returns the reductions, float32 (number of parameters,)."""
    update = request.update
    totals = {name: [] for name in update.reductions}  # type: dict[str, list[Tensor]]
    with torch.no_grad():
        for i in range(len(request.params)):
            sums = [_one(request, i, *piece) for piece in _pieces(request, i)]
            for j, name in enumerate(update.reductions):
                device = request.params[i].device
                parts = [s[j] for s in sums] or [torch.zeros((), dtype=torch.float64, device=device)]
                totals[name].append(torch.stack(parts).sum().float())
    return {name: torch.stack(parts) for name, parts in totals.items() if parts}


def _pieces(request: StepRequest, i: int) -> Iterator[tuple[int, int, int]]:
    """(first, last, elements before) along the first dimension, cut between rows, or between blocks of a 1-D tensor."""
    shape = request.params[i].shape
    if len(shape) < 2:
        length, unit, width = (shape[0] if shape else 1), math.lcm(*request.block_sizes), 1
    else:
        width = math.prod(shape[1:])
        length, unit = shape[0], 1
    if length * width == 0:
        return
    count = max(1, CHUNK // (unit * width)) * unit
    for first in range(0, length, count):
        yield first, min(first + count, length), first * width


def _one(request: StepRequest, i: int, first: int, last: int, before: int) -> list[Tensor]:
    update, param = request.update, request.params[i]
    flat = param.dim() < 2
    part = _part(param, first, last)
    geometry = blocks_of(part.shape, 1)
    rows, length = geometry.rows, geometry.row_length
    base = hashing.base_key(request.seed, request.step, request.numbers[i])
    start, column = (request.offsets[i], before) if flat else (request.offsets[i] + before, 0)

    def noise(slot: int) -> Tensor:
        return hashing.noise(base, start, rows, length, slot, param.device, column)

    def halves(slot: int) -> Tensor:
        return hashing.halves(base, start, rows, length, slot, param.device, column)

    values = []
    for j, stored in enumerate(request.states):
        codec = request.codecs[j]
        state = stored[i]
        if codec is None:
            values.append(_part(state, first, last).float().reshape(rows, length))  # type: ignore[arg-type]
        else:
            blocks = codec.blocks(part.shape)
            held = cut(state, codec, first, last)  # type: ignore[arg-type]
            values.append(decode_rows(held.codes.reshape(rows, -1), held.scales.reshape(rows, -1), codec, blocks))
    p = part.float().reshape(rows, length)
    g = _part(request.grads[i], first, last).float().reshape(rows, length)
    new_p, new_states, sums = update.apply(p, g, tuple(values), SimpleNamespace(**request.scalars))

    sound = torch.ones((), dtype=torch.bool, device=param.device)
    for codec, old, new in zip(request.codecs, values, new_states, strict=True):
        if codec is not None and new is not old:
            sound = sound & new.isfinite()
    for j, (old, new) in enumerate(zip(values, new_states, strict=True)):
        if new is old:
            continue
        codec, state = request.codecs[j], request.states[j][i]
        stochastic = request.roundings[j] == "stochastic"
        if codec is None:
            target = _part(state, first, last)  # type: ignore[arg-type]
            target.copy_(rounded(new, target.dtype, halves(j) if stochastic else None).reshape(target.shape))
        else:
            new = torch.where(sound, new, 0.0)  # else it raises no scale and starts anew
            codes, scales = encode_rows(new, codec, codec.blocks(part.shape), noise(j) if stochastic else None)
            held = cut(state, codec, first, last)  # type: ignore[arg-type]
            held.codes.copy_(codes.reshape(held.codes.shape))
            held.scales.copy_(scales.reshape(held.scales.shape))
    if new_p is not p:
        bits = halves(len(update.states)) if request.param_rounding == "stochastic" else None
        part.copy_(rounded(new_p, part.dtype, bits).reshape(part.shape))
    return [s.double().sum() for s in sums]


def _part(tensor: Tensor, first: int, last: int) -> Tensor:
    return tensor.reshape(1) if tensor.dim() == 0 else tensor[first:last]


def rounded(x: Tensor, dtype: torch.dtype, halves: Tensor | None) -> Tensor:
    """float32 to ``dtype``: to nearest even, or stochastically with 16-bit numbers (int64, like ``x``)."""
    if halves is None or dtype == torch.float32:
        return x.to(dtype)
    if dtype == torch.bfloat16:
        bits = x.view(torch.int32) + halves.to(torch.int32)
        kept = (bits & -65536).view(torch.float32)
        return torch.where(x.isfinite(), kept, x).to(dtype)
    # float16: the cell below x has the width of x's last place, 2**-24 among subnormals
    _, exponent = torch.frexp(x)
    cell = torch.ldexp(torch.ones_like(x), exponent.clamp(min=-13) - 11)
    low = torch.floor(x / cell)
    up = (halves.float() + 0.5) * 2.0**-16 < x / cell - low
    return torch.where(x.isfinite(), (low + up) * cell, x).to(dtype)
