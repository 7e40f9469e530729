"""What a rule works on: parameters that share a group, a format, types and a step count, for one fused pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from memopt import kernels
from memopt.kernels import Quantized, State, Update
from memopt.optim import sharding
from memopt.optim.formats.base import StateFormat
from memopt.optim.layout import Extent, as_rows


@dataclass(eq=False)
class Slot:
    """One parameter of an optimizer, with what its states are and how they are kept.

    ``number`` is its position over all groups; with the seed, the step and the element's index it decides how the
    stochastic rounding falls.
    """

    param: Tensor
    number: int
    extent: Extent
    specs: tuple[State, ...]
    format: StateFormat
    stored: dict[str, Any]

    @property
    def held(self) -> Mapping[str, Any]:
        """The stored tensors, of a sharded parameter the parts held here."""
        if not sharding.is_sharded(self.param):
            return self.stored
        return {k: sharding.local_of(v) if isinstance(v, Tensor) else v for k, v in self.stored.items()}

    def operand(self, spec: State) -> Tensor | Quantized:
        """A state as the kernels take it."""
        return self.format.operand(spec, self.held, self.extent)

    def decode(self, spec: State) -> Tensor:
        """A state as a new fp32 tensor of the local shape."""
        return self.format.decode(spec, self.held, self.extent)

    def write(self, spec: State, value: float | Tensor) -> None:
        """Store a state: a number for all elements, or a tensor of the local shape, rounded to nearest."""
        local = sharding.local_of(self.param)
        if isinstance(value, Tensor):
            fresh = self.format.encode(spec, value, self.extent)
        elif value:
            fresh = self.format.encode(spec, torch.full_like(local, value, dtype=torch.float32), self.extent)
        else:
            fresh = self.format.allocate(spec, local, self.extent)
        self.stored.update(self.whole(spec, fresh))

    def whole(self, spec: State, parts: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The tensors of one state as they are stored: of a sharded parameter, DTensors of the whole state."""
        if not sharding.is_sharded(self.param):
            return parts
        shape = self.extent.shape
        complete = self.format.allocate(spec, torch.empty(shape, device="meta"), Extent(shape, shape))
        return {key: sharding.like(self.param, part, tuple(complete[key].shape)) for key, part in parts.items()}

    def rows(self, tensor: Tensor) -> Tensor:
        """A tensor of the parameter's shape as the kernels take it beside this slot's states."""
        return as_rows(tensor, self.extent, self.format.block)


@dataclass(eq=False)
class Batch:
    """Slots that one kernel call can serve.

    Args:
        group: the parameter group's options.
        step: how many steps these parameters have taken, this one included.
        grad_scale: what rules multiply gradients by: -1 to maximise.
        slots: the parameters.
        grads: one gradient per slot.
    """

    group: Mapping[str, Any]
    step: int
    grad_scale: float
    slots: list[Slot] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)

    def each(self) -> list[Batch]:
        """One batch per slot, for rules whose scalars differ by parameter."""
        return [
            Batch(self.group, self.step, self.grad_scale, [slot], [grad])
            for slot, grad in zip(self.slots, self.grads, strict=True)
        ]

    def run(
        self, update: Update, scalars: Mapping[str, float], grads: Sequence[Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Carry out ``update`` on every slot in one pass, in place.

        Args:
            update: the element-wise rule; its states are among those of the slots.
            scalars: its numbers for this step.
            grads: used instead of the gradients, one per slot in the parameter's shape.

        Returns:
            The update's reductions by name, fp32, one number per slot.
        """
        locals_ = [sharding.local_of(slot.param) for slot in self.slots]
        params = [slot.rows(local) for slot, local in zip(self.slots, locals_, strict=True)]
        inputs = self.grads if grads is None else grads
        kept_by = self.slots[0].format
        sums = kernels.step(
            update,
            params,
            [slot.rows(sharding.local_of(grad)) for slot, grad in zip(self.slots, inputs, strict=True)],
            [[slot.operand(spec) for slot in self.slots] for spec in update.states],
            [kept_by.codec(spec) for spec in update.states],
            scalars,
            seed=self.group["seed"],
            step=self.step,
            numbers=[slot.number for slot in self.slots],
            offsets=[sharding.offset_of(slot.param) for slot in self.slots],
            roundings=[kept_by.rounding(spec) for spec in update.states],
            param_rounding=self.group["param_rounding"],
        )
        for local, param in zip(locals_, params, strict=True):
            if param.data_ptr() != local.data_ptr():  # a flat copy, of a parameter that is not contiguous
                local.copy_(param.view(local.shape))
        return sums
