"""What a rule works on: parameters that share a group, a format, types and a step count, for one fused pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from memopt import kernels
from memopt.kernels import Update
from memopt.optim import kahan, sharding
from memopt.optim.slot import Slot

if TYPE_CHECKING:
    from memopt.kernels.native.step import Launch


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
        lasting: whether the batch is kept for further steps: it is then worth while to prepare its passes.
        guard: what the kernels read on the device of a ``GradScaler``, where the host does not.
        started: whether one of the states starts with this step.
    """

    group: Mapping[str, Any]
    step: int
    grad_scale: float
    params: list[Tensor] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    lasting: bool = False
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
            one.group, one.step, one.grad_scale, one.lasting = self.group, self.step, self.grad_scale, self.lasting
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
        kept_by, lasting = self.slots[0].format, self.lasting and grads is None and given is None
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
