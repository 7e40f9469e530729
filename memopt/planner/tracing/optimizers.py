"""The optimizer of a traced step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from memopt.planner.tracing.faking import Faker
from memopt.planner.tracing.named_optimizers import NamedOptimizer
from memopt.planner.tracing.recorder import Recorder
from memopt.planner.tracking import tensors_in


class _WithoutKernels:
    """What memopt's optimizers update at once, with everything but the fused step: temporaries beside it are made."""

    def __init__(self, batch: Any) -> None:
        self._batch = batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch, name)

    def each(self) -> Iterator[_WithoutKernels]:
        return map(_WithoutKernels, self._batch.each())

    def run(self, update: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Only the sums that the kernel returns: it works in place."""
        return {name: torch.ones(len(self._batch.slots)) for name in update.reductions}


def settled_twin(faker: Faker, optimizer: Optimizer, cuda: bool) -> Optimizer:
    """The optimizer's twin over fake parameters, with the state that it has after a first step.

    On CUDA torch's optimizers update all parameters at once unless told otherwise; fake tensors would tell them so.
    """
    twin = faker.optimizer(optimizer)
    for group in twin.param_groups:
        if cuda and group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True
    update = getattr(twin, "update", None)
    if callable(update):  # memopt's own: kernels, which fakes cannot enter, do the arithmetic and allocate nothing
        sharded = any(hasattr(p, "placements") for group in twin.param_groups for p in group["params"])
        whole = sharded or getattr(twin, "elementwise", True)
        twin.__dict__["update"] = (lambda batch: None) if whole else (lambda batch: update(_WithoutKernels(batch)))
    trained = [p for group in twin.param_groups for p in group["params"] if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    twin.step()
    for parameter in trained:
        parameter.grad = None
    return twin


def state_bits(optimizer: Optimizer) -> float:
    """Bits of each number of an optimizer's state: of the element type that takes most of its bytes."""
    if isinstance(optimizer, NamedOptimizer):
        return optimizer.bits
    sizes: Counter[int] = Counter()
    for tensor in tensors_in(list(optimizer.state.values())):
        sizes[tensor.element_size()] += tensor.untyped_storage().nbytes()
    return 8.0 * sizes.most_common(1)[0][0] if sizes else 32.0


def steps_in_backward(model: nn.Module) -> bool:
    """Whether memopt updates the model's parameters inside backward; told by the home of the hooks on them."""
    hooks = [getattr(parameter, "_post_accumulate_grad_hooks", None) or {} for parameter in model.parameters()]
    return any("gradient_release" in (getattr(h, "__module__", "") or "") for found in hooks for h in found.values())


def forget_unused(optimizer: Optimizer, recorder: Recorder) -> None:
    """Takes back the state of parameters that got no gradient: a real optimizer never makes it."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is None:
                for tensor in tensors_in(optimizer.state.get(parameter)):
                    record = recorder.observe(tensor)
                    if record is not None:
                        record.death = record.birth
