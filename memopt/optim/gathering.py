"""Gathers the parameters that take a step into batches, and keeps the batches as long as nothing but values changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from memopt.optim import sharding
from memopt.optim.batch import Batch
from memopt.optim.coverage import All
from memopt.optim.gradients import require_dense
from memopt.optim.owner import Owner

_COUNTED = ("params", "skipped_steps")


@dataclass
class _Kept:
    """Batches, the group each belongs to, and what they were made from."""

    facts: list[Any]
    batches: list[Batch]
    groups: list[int]

    def renew(self, optimizer: Owner, facts: list[Any]) -> bool:
        """Make the batches those of the next step; False where they no longer fit."""
        if self.facts != facts:
            return False
        steps = []
        for batch in self.batches:
            step = batch.slots[0].stored["step"]
            for slot in batch.slots:
                stored = slot.stored
                if optimizer.state.get(slot.param) is not stored or stored["step"] != step:
                    return False
            steps.append(step + 1)
        for batch, index, step in zip(self.batches, self.groups, steps, strict=True):
            batch.group = group = optimizer.param_groups[index]
            batch.step, batch.grad_scale = step, optimizer.grad_factor(group)
            batch.started = False
            batch.grads = [param.grad for param in batch.params]  # type: ignore[misc]
        return True


class Gathering:
    """The batches of an optimizer's last steps, by the parameters that took part.

    Kept batches serve the next step if the groups have the same parameters and the same options but for numbers, the
    same parameters have gradients, and states, step counts, types and shapes are the ones that were seen: a state dict
    that was loaded, a new group, a parameter of another dtype make new ones. Sharded parameters, which are gathered
    anew for every step, and coverages that change are never kept.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[int, ...], _Kept] = {}

    def batches(self, optimizer: Owner) -> list[Batch]:
        """Parameters with gradients, gathered into as few batches as their differences allow.

        Raises:
            RuntimeError: a gradient is sparse; nothing has changed.
        """
        facts = _facts(optimizer)
        key = tuple(id(param) for group in optimizer.param_groups for param in group["params"])
        kept = self._kept.get(key)
        if kept is not None and kept.renew(optimizer, facts):
            return kept.batches
        made = _gather(optimizer)
        batches, groups = list(made.values()), [index for index, *_ in made]
        lasting = isinstance(optimizer.coverage, All) and not any(
            sharding.is_sharded(param) for batch in batches for param in batch.params
        )
        if len(self._kept) > 2 * len(key) + 8:
            self._kept.clear()
        if lasting:
            for batch in batches:
                batch.lasting = True
            self._kept[key] = _Kept(facts, batches, groups)
        else:
            self._kept.pop(key, None)
        return batches


def _facts(optimizer: Owner) -> list[Any]:
    """What decides the batches, apart from states and step counts."""
    facts: list[Any] = [type(optimizer.coverage)]
    for group in optimizer.param_groups:
        params = group["params"]
        grads = [param.grad for param in params]
        require_dense(params, type(optimizer).__name__)
        facts += [
            _structure(group),
            [None if grad is None else grad.dtype for grad in grads],
            [param.dtype for param in params],
            [param.shape for param in params],
            [param.device for param in params],
            [param.stride() for param in params],
            None if optimizer.numbering is None else [optimizer.numbering[param] for param in params],
        ]
    return facts


def _structure(group: Mapping[str, Any]) -> list[Any]:
    """A group's options as far as states depend on them: of a number only whether it is 0."""
    return [(name, _kind(value)) for name, value in group.items() if name not in _COUNTED]


def _kind(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Tensor
    if isinstance(value, float):
        return value != 0.0
    if isinstance(value, (tuple, list)):
        return [_kind(one) for one in value]
    return value


def _gather(optimizer: Owner) -> dict[tuple[Any, ...], Batch]:
    """New batches, by the group's index and what else tells them apart; fresh states where there are none."""
    batches: dict[tuple[Any, ...], Batch] = {}
    count = -1
    for index, group in enumerate(optimizer.param_groups):
        for param in group["params"]:
            count += 1
            number = count if optimizer.numbering is None else optimizer.numbering[param]
            grad = param.grad
            if grad is None or not optimizer.coverage.covers(number, param):
                continue
            slot = optimizer.slot(number, group, param, optimizer.state[param])
            started = optimizer.complete(slot, group)
            if slot.reach is not None:
                slot.param, grad = slot.reach.fetch(grad)
            step = slot.stored["step"] + 1
            names = tuple([spec.name for spec in slot.specs])
            contiguous = sharding.local_of(param).is_contiguous()
            key = (index, step, started, names, slot.format.name, param.dtype, grad.dtype, param.device, contiguous)
            batch = batches.get(key)
            if batch is None:
                batch = batches[key] = Batch(group, step, optimizer.grad_factor(group), started=started)
            batch.params.append(param)
            batch.slots.append(slot)
            batch.grads.append(grad)
    return batches
