"""Arguments with a state of their own: a replay sees them as the call did, and leaves the caller's alone."""

from __future__ import annotations

import weakref
from collections import OrderedDict, namedtuple
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memopt.offload import apply
from memopt.offload.arguments import Absent, Arguments
from memopt.planner.values import Action
from tests.offload.models import Case, everything, make_plan, same, templates

Pair = namedtuple("Pair", "left right")


@dataclass
class Slot:
    keys: Tensor | None = None


@dataclass
class Cache:
    slots: list[Slot] = field(default_factory=list)
    calls: int = 0


class Plain:
    __slots__ = ("tensor", "twin")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.twin = tensor, [tensor]


class Cached(nn.Module):
    """Attends to what it and its likes have put into a cache, counts its calls, and notes its outputs in a list."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.linear = number, nn.Linear(8, 8)

    def forward(self, x: Tensor, cache: Cache, notes: list[Any]) -> Tensor:
        cache.calls += 1
        while len(cache.slots) <= self.number // 2:
            cache.slots.append(Slot())
        slot = cache.slots[self.number // 2]
        y = F.dropout(self.linear(x).tanh(), 0.2)
        slot.keys = y if slot.keys is None else torch.cat([slot.keys, y], 1)
        notes.append(y)
        return x + (slot.keys.exp().mean(1, keepdim=True) * len(notes)).sigmoid() * cache.calls


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Cached(n) for n in range(4))
        self.seen: Any = None

    def forward(self, x: Tensor) -> Tensor:
        cache, notes = Cache(), []
        for block in self.blocks:
            x = block(x, cache, notes=notes)
        self.seen = cache.calls, len(notes), weakref.ref(cache)
        return x.square().mean() + notes[1].mean()


@pytest.mark.parametrize("action", [Action.SWAP, Action.RECOMPUTE])
def test_a_cache_and_a_list_that_blocks_fill(action: Action) -> None:
    case = Case(Model, lambda g: (torch.randn(2, 3, 8, generator=g),), tuple(f"blocks.{n}" for n in range(4)))
    torch.manual_seed(0)
    model = Model()
    (x,) = case.inputs(torch.Generator().manual_seed(1))
    found = templates(case, model, (x,))

    def steps() -> list[Tensor]:
        torch.manual_seed(5)
        grads = []
        for _ in range(3):
            loss = model(x)
            grads += [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)]
            grads += torch.autograd.grad(loss, list(model.parameters()))
            assert model.seen[:2] == (4, 4)
        return [*grads, torch.get_rng_state()]

    expected = steps()
    with apply(model, make_plan(case, everything(found, action))) as handle:
        assert same(steps(), expected)
        assert handle.counts.whole == 0, handle.counts.reasons
        loss = model(x)
        assert model.seen[2]() is None  # the plan holds no cache
        del loss


def test_copies_keep_kinds_and_identities() -> None:
    a, b = torch.zeros(1), torch.ones(1)
    holder = Plain(a)
    loop: list[Any] = [holder]
    loop.append(loop)
    lock = object()
    module = nn.Linear(1, 1)
    given = ((a, Pair(b, {"x": a}), loop), {"o": OrderedDict(k=b), "s": {1}, "m": module, "l": lock, "p": holder})
    arguments = Arguments(given[0], given[1])
    assert [id(t) for t in arguments.held] == [id(a), id(b)]
    assert arguments.inputs == [0, 1]
    (x, pair, copy), kwargs = arguments.again(lambda place, held: held + 5)
    assert isinstance(pair, Pair)
    assert pair.right["x"] is x
    assert (x.item(), pair.left.item()) == (5, 6)
    assert copy[1] is copy
    assert copy is not loop
    assert type(copy[0]) is Plain
    assert copy[0] is kwargs["p"] is not holder
    assert copy[0].twin[0] is copy[0].tensor is x
    assert type(kwargs["o"]) is OrderedDict
    assert kwargs["m"] is module
    assert kwargs["l"] is lock
    assert holder.tensor is a


def test_inputs_lie_at_most_one_object_deep() -> None:
    """The trace counts them so: what a cache's layers hold is not the block's input."""
    x, y = torch.zeros(2), torch.zeros(3)
    arguments = Arguments((x, Cache([Slot(y)])), {"slot": Slot(torch.zeros(4))})
    assert [t.numel() for t in arguments.tensors()] == [2, 4]
    assert arguments.read(lambda tensor: False) == {0, 2}
    arguments.forget(3, frozenset({0, 2}))
    assert isinstance(arguments.held[1], Absent)
    assert arguments.held[1].layout.size == (3,)
