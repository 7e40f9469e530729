"""The optimizer of a traced step."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn
from torch.optim import Optimizer

from memopt.planner.faking import Faker
from memopt.planner.named_optimizers import NamedOptimizer
from memopt.planner.recorder import Recorder
from memopt.planner.records import tensors_in


def settled_twin(faker: Faker, optimizer: Optimizer, cuda: bool) -> Optimizer:
    """The optimizer's twin over fake parameters, with the state that it has after a first step.

    On CUDA torch's optimizers update all parameters at once unless told otherwise; fake tensors would tell them so.
    """
    twin = faker.optimizer(optimizer)
    for group in twin.param_groups:
        if cuda and group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True
    if callable(getattr(twin, "update", None)):  # memopt's own: kernels do the arithmetic, the class only keeps state
        twin.__dict__["update"] = lambda batch: None
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
