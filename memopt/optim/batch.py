"""What a rule works on: parameters that share a group, a format, types and a step count, for one fused pass."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from memopt import kernels
from memopt.kernels import Quantized, State, Update
from memopt.optim import kahan, sharding
from memopt.optim.formats.base import Plain, StateFormat
from memopt.optim.formats.fp32 import FORMAT as FP32
from memopt.optim.layout import Extent, Shape, as_rows, is_flat
from memopt.optim.reaching import Reach

if TYPE_CHECKING:
    from memopt.kernels.native.step import Launch


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


@dataclass(eq=False)
class Batch:
    """Slots that one kernel call can serve.

    Args:
        group: the parameter group's options.
        step: how many steps these parameters have taken, this one included.
        grad_scale: what rules multiply gradients by: -1 to maximise, over the scale of a ``GradScaler``.
        params: the optimizer's parameters.
        slots: how they are updated: a slot may hold a gathered copy of a sharded parameter.
        grads: one gradient per slot.
        repeated: whether the batch has served a step before: it is then worth while to prepare its passes.
        guard: what the kernels read on the device of a ``GradScaler``, where the host does not.
        started: whether one of the states starts with this step.
    """

    group: Mapping[str, Any]
    step: int
    grad_scale: float
    params: list[Tensor] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    repeated: bool = False
    guard: Tensor | None = None
    started: bool = False
    _singles: list[Batch] = field(default_factory=list)
    _launches: dict[tuple[Update, str], Launch | None] = field(default_factory=dict)

    def grad(self, i: int) -> Tensor:
        """The gradient of slot ``i``, of a sharded parameter the part held here."""
        return sharding.local_of(self.grads[i])

    def each(self) -> list[Batch]:
        """One batch per slot, for rules whose scalars differ by parameter."""
        if not self._singles:
            self._singles = [
                Batch(self.group, self.step, self.grad_scale, [param], [slot])
                for param, slot in zip(self.params, self.slots, strict=True)
            ]
        for one, grad in zip(self._singles, self.grads, strict=True):
            one.group, one.step, one.grad_scale, one.repeated = self.group, self.step, self.grad_scale, self.repeated
            one.grads = [grad]
        return self._singles

    def forget(self) -> None:
        """Let go of the gradients, so that they can be freed between steps."""
        for one in (self, *self._singles):
            one.grads = []

    def run(
        self,
        update: Update,
        scalars: Mapping[str, float],
        grads: Sequence[Tensor] | None = None,
        given: Mapping[str, Sequence[Tensor]] | None = None,
    ) -> dict[str, Tensor]:
        """Carry out ``update`` on every slot in one pass, in place.

        Args:
            update: the element-wise rule; its states are among those of the slots or of ``given``.
            scalars: its numbers for this step.
            grads: used instead of the gradients, one per slot in the parameter's local shape.
            given: tensors to take the place of states by name, one per slot in the parameter's local shape.

        Returns:
            The update's reductions by name, fp32, one number per slot.
        """
        kept_by, lasting = self.slots[0].format, self.repeated and grads is None and given is None
        given = {} if given is None else dict(given)
        rounding = self.group["param_rounding"]
        if rounding == "kahan":
            rounding = "nearest"
            dtype = self.slots[0].param.dtype
            if kahan.applies("kahan", dtype):
                update = kahan.compensated(update, dtype)
                name = kahan.COMPENSATION.name
                given[name] = [cast(Tensor, slot.held[name]) for slot in self.slots]
        repeated = self._repeat(update, rounding, scalars) if lasting else None
        if repeated is not None:
            return repeated
        locals_ = [sharding.local_of(slot.param) for slot in self.slots]
        params = [slot.rows(local) for slot, local in zip(self.slots, locals_, strict=True)]
        inputs = self.grads if grads is None else grads
        states = [
            [slot.rows(one) for slot, one in zip(self.slots, given[spec.name], strict=True)]
            if spec.name in given
            else [slot.operand(spec) for slot in self.slots]
            for spec in update.states
        ]
        arguments = (
            update,
            params,
            [slot.rows(sharding.local_of(grad)) for slot, grad in zip(self.slots, inputs, strict=True)],
            states,
            [None if spec.name in given else kept_by.codec(spec) for spec in update.states],
            scalars,
        )
        options = {
            "seed": self.group["seed"],
            "step": self.step,
            "numbers": [slot.number for slot in self.slots],
            "offsets": [slot.offset for slot in self.slots],
            "roundings": [
                # a compensation rounded to nearest would itself lose what is far below its spacing
                "stochastic"
                if spec is kahan.COMPENSATION
                else "nearest"
                if spec.name in given
                else kept_by.rounding(spec)
                for spec in update.states
            ],
            "param_rounding": rounding,
        }
        if self.guard is not None:
            options["guard"] = self.guard
        if hasattr(kept_by, "step"):  # of a format that needs more than one pass
            join = sharding.join_columns([slot.param for slot in self.slots])
            sums: dict[str, Tensor] = kept_by.step(*arguments, **options, join=join)
        else:
            if lasting:
                request = kernels.step_request(*arguments, **options)
                self._launches[update, rounding] = kernels.prepare(request, self.params, self._memory(update))
                repeated = self._repeat(update, rounding, scalars)
                if repeated is not None:
                    return repeated
            sums = kernels.step(*arguments, **options)
        for local, param in zip(locals_, params, strict=True):
            if param.data_ptr() != local.data_ptr():  # a flat copy, of a parameter that is not contiguous
                local.copy_(param.view(local.shape))
        if sums and any(sharding.is_sharded(slot.param) for slot in self.slots):
            shared = sharding.sum_each(torch.stack(list(sums.values())), [slot.param for slot in self.slots])
            sums = dict(zip(sums, shared, strict=True))
        return sums

    def _repeat(self, update: Update, rounding: str, scalars: Mapping[str, float]) -> dict[str, Tensor] | None:
        """The pass as it was prepared in an earlier step; None where there is none or it no longer fits."""
        launch = self._launches.get((update, rounding))
        if launch is None:
            return None
        return launch.run(self.params, self._memory(update), self.grads, scalars, self.group["seed"], self.step)

    def _memory(self, update: Update) -> list[Tensor]:
        """The tensors that the update's states are kept in now: for each state, for each slot."""
        kept_by, found = self.slots[0].format, []
        for spec in update.states:
            keys = (spec.name,) if spec is kahan.COMPENSATION else kept_by.keys(spec)
            found += [slot.stored[key] for slot in self.slots for key in keys]
        return found
