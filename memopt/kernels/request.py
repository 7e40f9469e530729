"""A checked call of the fused step, as every back end receives it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from memopt.kernels.codecs import Codec
from memopt.kernels.quantized import FLOATS, Quantized, check_floating, check_rounding
from memopt.kernels.update import Update

Stored = Tensor | Quantized
_FACTOR = "gradient_factor"


@dataclass(frozen=True)
class StepRequest:
    """The arguments of :func:`memopt.kernels.step`, complete and checked."""

    update: Update
    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    states: Sequence[Sequence[Stored]]
    codecs: tuple[Codec | None, ...]
    roundings: tuple[str, ...]
    scalars: Mapping[str, float]
    seed: int
    step: int
    numbers: Sequence[int]
    offsets: Sequence[int]
    param_rounding: str
    guard: Tensor | None = None

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """Block sizes of the quantised states; (1,) where there are none."""
        return tuple(c.block for c in self.codecs if c is not None) or (1,)


def unguarded(request: StepRequest) -> StepRequest | None:
    """The request with its guard read on the host and carried out; None where the step is called off."""
    if request.guard is None:
        return request
    factor, off = request.guard.tolist()
    scaled = replace(request, update=_scaled(request.update), scalars={**request.scalars, _FACTOR: factor}, guard=None)
    return None if off > 0 else scaled


@functools.lru_cache(maxsize=64)
def _scaled(update: Update) -> Update:
    """The same rule on gradients times a scalar."""

    def fn(p: Any, g: Any, states: tuple[Any, ...], s: Any) -> tuple[Any, ...]:
        return update.fn(p, g * getattr(s, _FACTOR), states, s)

    return replace(update, name=f"{update.name}_scaled", scalars=(*update.scalars, _FACTOR), fn=fn)


def mark_written(request: StepRequest, members: Sequence[int]) -> None:
    """Tells autograd that a kernel has changed what the rule writes, as an in-place operation of torch would."""
    *states, param = request.update.writes()
    changed = [request.params[i] for i in members] if param else []
    for stored, written in zip(request.states, states, strict=True):
        for state in (stored[i] for i in members if written):
            changed += [state.codes, state.scales] if isinstance(state, Quantized) else [state]
    torch.autograd.graph.increment_version(changed)


def check(request: StepRequest) -> None:
    """Raises ValueError or TypeError that names the argument, before anything is changed."""
    update, count = request.update, len(request.params)
    _same_length("grads", request.grads, count)
    _same_length("numbers", request.numbers, count)
    _same_length("offsets", request.offsets, count)
    for name, given in (("states", request.states), ("codecs", request.codecs), ("roundings", request.roundings)):
        if len(given) != len(update.states):
            raise ValueError(f"{name} must have one entry for each of the {len(update.states)} states of "
                             f"{update.name!r}, got {len(given)}")  # fmt: skip
    missing = [name for name in update.scalars if name not in request.scalars]
    if missing:
        raise ValueError(f"scalars lacks {', '.join(missing)}, which update {update.name!r} needs")
    guard = request.guard
    if guard is not None and (guard.shape != (2,) or guard.dtype != torch.float32):
        raise ValueError(f"guard must be 2 float32 numbers, got {guard.dtype} of shape {tuple(guard.shape)}")
    check_rounding(request.param_rounding)
    for rounding in request.roundings:
        check_rounding(rounding)
    for i, (p, g) in enumerate(zip(request.params, request.grads, strict=True)):
        check_floating(f"params[{i}]", p)
        check_floating(f"grads[{i}]", g)
        if g.shape != p.shape or g.device != p.device:
            raise ValueError(f"grads[{i}] must be like params[{i}], {tuple(p.shape)} on {p.device}, "
                             f"got {tuple(g.shape)} on {g.device}")  # fmt: skip
        if request.offsets[i] < 0:
            raise ValueError(f"offsets[{i}] must not be negative, got {request.offsets[i]}")
    for j, stored in enumerate(request.states):
        name = update.states[j].name
        _same_length(f"states[{j}] ({name})", stored, count)
        codec = request.codecs[j]
        for i, (p, state) in enumerate(zip(request.params, stored, strict=True)):
            _check_state(f"states[{j}][{i}] ({name})", p, state, codec)


def _check_state(label: str, p: Tensor, state: Stored, codec: Codec | None) -> None:
    if codec is None:
        if not isinstance(state, Tensor):
            raise TypeError(f"{label} must be a tensor where codecs gives None, got {type(state).__name__}")
        if state.shape != p.shape or state.dtype not in FLOATS or state.device != p.device:
            raise ValueError(f"{label} must be a float tensor {tuple(p.shape)} on {p.device}, "
                             f"got {state.dtype} {tuple(state.shape)} on {state.device}")  # fmt: skip
        return
    if not isinstance(state, Quantized):
        raise TypeError(f"{label} must be Quantized for codec {codec.name!r}, got {type(state).__name__}")
    blocks = codec.blocks(p.shape)
    for part, tensor, shape, dtype in (
        ("codes", state.codes, blocks.code_shape(p.shape, codec.bits), torch.uint8),
        ("scales", state.scales, blocks.scale_shape, torch.float32),
    ):
        fits = tensor.shape == shape and tensor.dtype == dtype and tensor.device == p.device
        if not fits or not tensor.is_contiguous():
            raise ValueError(
                f"{label}.{part} must be contiguous {dtype} {shape} on {p.device} for codec {codec.name!r} with block "
                f"{codec.block}, got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            )


def _same_length(name: str, given: Sequence[object], count: int) -> None:
    if len(given) != count:
        raise ValueError(f"{name} must have one entry per parameter ({count}), got {len(given)}")
