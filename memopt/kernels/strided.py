"""Tensors whose rows do not lie one after another: the step works on copies of a few rows at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from memopt.kernels.codecs import Codec
from memopt.kernels.quantized import Quantized
from memopt.kernels.request import StepRequest, Stored

PIECE = 1 << 15  # elements copied at once: the copies of all tensors stay below a mebibyte

Runner = Callable[[StepRequest], dict[str, Tensor]]


def run_contiguous(request: StepRequest, runner: Runner) -> dict[str, Tensor]:
    """``runner(request)`` for a runner that takes contiguous tensors only."""
    strided = [i for i in range(len(request.params)) if not _is_contiguous(request, i)]
    if not strided:
        return runner(request)
    others = sorted(set(range(len(request.params))) - set(strided))
    sums = {n: torch.zeros(len(request.params), device=request.params[0].device) for n in request.update.reductions}
    with torch.no_grad():
        if others:
            for name, values in runner(_only(request, others)).items():
                sums[name][others] = values
        for i in strided:
            for piece, copied in _pieces(request, i):
                for name, values in runner(piece).items():
                    sums[name][i] += values[0]
                for original, copy in copied:
                    original.copy_(copy.view(original.shape))
    return sums


def _is_contiguous(request: StepRequest, i: int) -> bool:
    tensors = [request.params[i], request.grads[i], *(s[i] for s in request.states)]
    return all(isinstance(t, Quantized) or t.is_contiguous() for t in tensors)


def _only(request: StepRequest, members: Sequence[int]) -> StepRequest:
    return replace(
        request,
        params=[request.params[i] for i in members],
        grads=[request.grads[i] for i in members],
        states=[[stored[i] for i in members] for stored in request.states],
        numbers=[request.numbers[i] for i in members],
        offsets=[request.offsets[i] for i in members],
    )


def _pieces(request: StepRequest, i: int) -> Iterator[tuple[StepRequest, list[tuple[Tensor, Tensor]]]]:
    """Requests on contiguous copies of some rows, or blocks of a 1-D tensor; and what to copy back, with its copy."""
    whole = _only(request, [i])
    shape = request.params[i].shape
    width = math.prod(shape[1:])
    unit = math.lcm(*request.block_sizes) if len(shape) < 2 else 1
    count = max(1, PIECE // max(unit * width, 1)) * unit
    for first in range(0, shape[0] if shape else 1, count):
        last = min(first + count, shape[0]) if shape else 1

        def part(tensor: Tensor, first: int = first, last: int = last) -> Tensor:
            return tensor[first:last] if tensor.dim() else tensor.reshape(1)

        param, grad = part(whole.params[0]), part(whole.grads[0])
        copied = [(param, param.contiguous())]
        states: list[list[Stored]] = []
        for stored, codec in zip(whole.states, request.codecs, strict=True):
            state = stored[0]
            if isinstance(state, Quantized):
                assert codec is not None
                states.append([cut(state, codec, first, last)])
            else:
                copied.append((part(state), part(state).contiguous()))
                states.append([copied[-1][1]])
        yield (
            replace(
                whole,
                params=[copied[0][1]],
                grads=[grad.contiguous()],
                states=states,
                offsets=[request.offsets[i] + first * width],
            ),
            [(old, new) for old, new in copied if old.data_ptr() != new.data_ptr() and not _is_broadcast(old)],
        )


def _is_broadcast(tensor: Tensor) -> bool:
    """Whether elements share memory: an operand that rules read and never write."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def cut(state: Quantized, codec: Codec, first: int, last: int) -> Quantized:
    """Some rows of a quantised tensor, or some blocks of a 1-D one, as views."""
    shape = state.shape
    if len(shape) >= 2:
        return Quantized(state.codes[first:last], state.scales[first:last], (last - first, *shape[1:]), codec)
    if not shape:
        return Quantized(state.codes.reshape(-1), state.scales, (1,), codec)
    blocks, at = codec.blocks((last - first,)), first // codec.block
    start, count = (first, last - first) if codec.bits == 8 else (at * ((codec.block + 1) // 2), blocks.row_bytes)
    return Quantized(state.codes[start : start + count], state.scales[at : at + blocks.per_row], (last - first,), codec)
