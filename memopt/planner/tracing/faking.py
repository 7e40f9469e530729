"""A model, its inputs and its optimizer as fake tensors, without touching the user's.

The model object itself runs, with fake tensors in the place of its parameters, buffers and tensor attributes; whatever
happens, every module's attributes are put back as they were. So closures and hooks that refer to the modules work, tied
parameters stay tied, and nothing is copied.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim import Optimizer

from memopt.planner.tracking import tensors_in

_RUNTIME = "memopt.offload"
_TABLES = ("_parameters", "_buffers", "_modules")


class Faker:
    """Turns tensors into fake ones; the same tensor always gives the same fake one, shared storages stay shared."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._made: dict[int, tuple[Tensor, Tensor]] = {}

    def tensor(self, real: Tensor) -> Tensor:
        """The fake tensor that stands for a real or meta one. Meta tensors count as lying on the CPU."""
        if isinstance(real, FakeTensor) and real.fake_mode is self.mode:
            return real
        if id(real) not in self._made:
            fake = self.mode.from_tensor(real)
            if real.is_meta:
                fake.fake_device = torch.device("cpu")
            if fake.grad is not None:
                fake.grad = None
            self._made[id(real)] = (real, fake)
        return self._made[id(real)][1]

    def stand_in(self, tensor: Tensor) -> Tensor:
        """The fake tensor of a real one that has one already, else the tensor itself."""
        return self._made[id(tensor)][1] if id(tensor) in self._made else tensor

    def value(self, value: Any) -> Any:
        """Nested tuples, lists and dicts with every tensor replaced; anything else as it is."""
        if isinstance(value, Tensor):
            return self.tensor(value)
        if type(value) in (list, tuple):
            return type(value)(self.value(item) for item in value)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(self.value(item) for item in value))
        if isinstance(value, dict):
            items = {key: self.value(item) for key, item in value.items()}
            return items if type(value) is dict else _like(value, items)
        return value

    def optimizer(self, real: Optimizer) -> Optimizer:
        """The optimizer's twin over the fake parameters, with its state; the real one shares nothing with it."""
        twin: Optimizer = object.__new__(type(real))
        twin.__dict__.update(real.__dict__)
        twin.param_groups = [self.value(dict(group)) for group in real.param_groups]
        twin.state = defaultdict(dict)
        for parameter, state in real.state.items():
            twin.state[self.tensor(parameter) if isinstance(parameter, Tensor) else parameter] = self.value(state)
        return twin


def _like(original: dict[Any, Any], items: dict[Any, Any]) -> dict[Any, Any]:
    try:
        return type(original)(items)
    except TypeError:
        return items


@contextmanager
def faked(model: nn.Module, faker: Faker) -> Iterator[None]:
    """Runs its body with fake tensors in the model, then puts back every attribute and the random number states."""
    modules = list(model.modules())
    attributes = [dict(module.__dict__) for module in modules]
    tables = [{name: dict(module.__dict__[name]) for name in _TABLES} for module in modules]
    containers = [
        (value, value.copy())
        for members in attributes
        for name, value in members.items()
        if name not in _TABLES and type(value) in (list, dict, set)
    ]
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    try:
        for module, members in zip(modules, attributes, strict=True):
            if "forward" in members:
                module.__dict__["forward"] = _without_plan(members["forward"])
            for name in ("_parameters", "_buffers"):
                table = module.__dict__[name]
                for key, tensor in list(table.items()):
                    if tensor is not None:
                        table[key] = faker.tensor(tensor)
            for name, value in members.items():
                if name not in _TABLES and next(tensors_in(value, 3), None) is not None:
                    module.__dict__[name] = faker.value(value)
        yield
    finally:
        for module, members, kept in zip(modules, attributes, tables, strict=True):
            module.__dict__.clear()
            module.__dict__.update(members)
            for name in _TABLES:
                members[name].clear()
                members[name].update(kept[name])
        for value, copy in containers:
            _restore(value, copy)
        torch.set_rng_state(torch_state)
        random.setstate(python_state)


def _without_plan(forward: Any) -> Any:
    """What runs where no plan is applied; tiles that are not a plan's stay."""
    if not type(forward).__module__.startswith(_RUNTIME):
        return forward
    own = _without_plan(forward.own)
    return own if forward.of_plan else forward.over(own)


def _restore(value: Any, copy: Any) -> None:
    if isinstance(value, list):
        value[:] = copy
    else:
        value.clear()
        value.update(copy)
