"""What the states of one parameter are, and how they are kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memopt.kernels import Quantized, State
from memopt.optim import kahan, sharding
from memopt.optim.formats.base import Plain, StateFormat
from memopt.optim.formats.fp32 import FORMAT as FP32
from memopt.optim.layout import Extent, Shape, as_rows, is_flat
from memopt.optim.reaching import Reach


@dataclass(frozen=True)
class SmallState(State):
    """A state of a shape of its own, such as one number per row; kept in fp32 whatever the format.

    Where its first size is that of the parameter's, it is sharded with the parameter.
    """

    shape: Shape = ()


@dataclass(eq=False)
class Slot:
    """One parameter of an optimizer, with what its states are and how they are kept.

    ``number`` is its position over all groups; with the seed, the step and the element's index it decides how the
    stochastic rounding falls. Where there is a ``reach``, ``param`` is what it fetches for a step. ``idle`` are states
    that other options would ask for: where they are stored, from steps under these, they stay as they are.
    """

    param: Tensor
    number: int
    extent: Extent
    specs: tuple[State, ...]
    format: StateFormat
    stored: dict[str, Any]
    reach: Reach | None = None
    idle: tuple[State, ...] = ()

    @property
    def shape(self) -> Shape:
        """The whole parameter's shape."""
        return tuple((self.param if self.reach is None else self.reach.param).shape)

    @property
    def offset(self) -> int:
        """Index, in the flattened whole parameter, of the first element of ``param``."""
        return sharding.offset_of(self.param) if self.reach is None else self.reach.offset

    def kept(self, spec: State) -> tuple[StateFormat, Extent]:
        """How a state is stored: as the slot says; a compensation in the parameter's type; in fp32 a small state."""
        if spec is kahan.COMPENSATION:
            return Plain("compensation", self.param.dtype), self.extent
        if not isinstance(spec, SmallState):
            return self.format, self.extent
        local = self.extent.local
        return FP32, Extent(spec.shape, (local[0], *spec.shape[1:]) if self.cut(spec) else spec.shape)

    def cut(self, spec: State) -> bool:
        """Whether a state is sharded with the parameter; others are whole on every rank."""
        whole = self.extent.shape
        if not isinstance(spec, SmallState):
            return True
        return len(spec.shape) > 0 and len(whole) > 0 and spec.shape[0] == whole[0]

    @property
    def held(self) -> Mapping[str, Any]:
        """The stored tensors, of a sharded parameter the parts held here."""
        if not sharding.is_sharded(self.param):
            return self.stored
        return {k: sharding.local_of(v) if isinstance(v, Tensor) else v for k, v in self.stored.items()}

    def operand(self, spec: State) -> Tensor | Quantized:
        """A state as the kernels take it."""
        kept_by, extent = self.kept(spec)
        return kept_by.operand(spec, self.held, extent)

    def decode(self, spec: State) -> Tensor:
        """A state as a new fp32 tensor of its local shape."""
        kept_by, extent = self.kept(spec)
        return kept_by.decode(spec, self.held, extent)

    def write(self, spec: State, value: float | Tensor) -> None:
        """Store a state: a number for all elements, or a tensor of the local shape, rounded to nearest."""
        kept_by, extent = self.kept(spec)
        if isinstance(value, Tensor):
            fresh = kept_by.encode(spec, value, extent, sharding.join_columns([self.param]))
        elif value:
            full = torch.full_like(self.blank(spec), value, dtype=torch.float32)
            fresh = kept_by.encode(spec, full, extent, sharding.join_columns([self.param]))
        else:
            fresh = kept_by.allocate(spec, self.blank(spec), extent)
        self.stored.update(self.whole(spec, fresh))

    def blank(self, spec: State) -> Tensor:
        """A tensor of a state's local shape, layout and device whose values do not matter."""
        local = sharding.local_of(self.param)
        _, extent = self.kept(spec)
        alike = extent.local == tuple(local.shape) and spec is not kahan.COMPENSATION  # which is written through views
        return local if alike else local.new_empty(extent.local)

    def whole(self, spec: State, parts: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The tensors of one state as they are stored: of a sharded parameter, DTensors of the whole state."""
        if not sharding.is_sharded(self.param) or not self.cut(spec):
            return parts
        kept_by, extent = self.kept(spec)
        complete = self.shapes(spec, extent.shape)
        flat = True if is_flat(extent, kept_by.block) and kept_by.block else None
        return {key: sharding.like(self.param, part, complete[key], cut=flat) for key, part in parts.items()}

    def shapes(self, spec: State, shape: Shape) -> dict[str, Shape]:
        """The shapes of the tensors that hold a state of an unsharded parameter of that shape."""
        fresh = self.kept(spec)[0].allocate(spec, torch.empty(shape, device="meta"), Extent(shape, shape))
        return {key: tuple(one.shape) for key, one in fresh.items()}

    def taken(self, spec: State, key: str, saved: Tensor) -> Tensor:
        """Of a tensor of a state dict what is kept here under ``key``, or as a plain state under the state's name."""
        if self.reach is None:
            return sharding.kept_of(saved, self.stored.get(key, self.param))
        return self.reach.kept(saved, *self._measures(spec, key))

    def shown(self) -> dict[str, Any]:
        """What is stored as a state dict shows it; where the slot has a reach, all ranks must take part."""
        shown = dict(self.stored)
        if self.reach is None:
            return shown
        for spec in (*self.specs, *self.idle):
            for key in self.kept(spec)[0].keys(spec):
                if key in shown:
                    shown[key] = self.reach.shown(shown[key], *self._measures(spec, key))
        return shown

    def _measures(self, spec: State, key: str) -> tuple[Shape, int]:
        """The shape of a stored tensor for the whole parameter, and how many of its elements belong to a block."""
        block = self.format.block
        if isinstance(spec, SmallState):
            return spec.shape, 1
        if key not in self.kept(spec)[0].keys(spec):  # a plain state that another optimizer has saved
            return self.shape, block
        return self.shapes(spec, self.shape)[key], math.prod(self.shapes(spec, (block,))[key])

    def rows(self, tensor: Tensor) -> Tensor:
        """A tensor of the parameter's shape as the kernels take it beside this slot's states."""
        return as_rows(tensor, self.extent, self.format.block)
