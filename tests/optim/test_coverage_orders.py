"""BlockCoordinate: which block is trained when, and what backward does for the others."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from memopt.optim import AdamW8bit
from memopt.optim.coverage.block_coordinate import BlockCoordinate
from tests.optim.coverage_models import loss_of, tiny, train, values


@pytest.mark.parametrize("order", ["random", "ascending", "descending", "fixed", "greedy"])
def test_only_the_active_block_moves_and_needs_gradients(order: str) -> None:
    model = tiny()
    optimizer = BlockCoordinate(model, AdamW8bit, switch_every=2, order=order, lr=1e-2)
    before = values(model)
    for step in range(12):
        block = optimizer.active_block
        needed = {name for name, p in model.named_parameters() if p.requires_grad}
        assert needed == set(block.names) or (order == "greedy" and step % 2 == 1)
        holders = {p for p in optimizer.state if len(optimizer.state[p]) > 1}
        assert holders <= set(block.params)
        assert holders or step % 2 == 0
        train(model, optimizer, range(step, step + 1))
        now = values(model)
        moved = {name for name in now if not torch.equal(now[name], before[name])}
        assert moved == set(block.names)
        assert all(p.grad is None for p in model.parameters())
        before = now


def visited(order: str, visits: int, **options: Any) -> list[int]:
    model = tiny()
    optimizer = BlockCoordinate(model, torch.optim.SGD, switch_every=1, order=order, lr=1e-3, **options)
    seen = []
    for step in range(visits):
        seen.append(optimizer.blocks.index(optimizer.active_block))
        train(model, optimizer, range(step, step + 1))
    return seen


def test_orders() -> None:
    assert visited("ascending", 7) == [0, 1, 2, 3, 4, 0, 1]
    assert visited("descending", 7) == [4, 3, 2, 1, 0, 4, 3]
    assert visited("ascending", 3, start=3) == [3, 4, 0]
    assert visited("fixed", 3, start=2) == [2, 2, 2]
    turns = visited("random", 15)
    assert [sorted(turns[i : i + 5]) for i in (0, 5, 10)] == [[0, 1, 2, 3, 4]] * 3
    assert turns[:5] != turns[5:10]
    assert turns == visited("random", 15)
    assert turns != visited("random", 15, seed=1)


def test_greedy_takes_the_block_with_the_largest_gradient_and_keeps_none_of_the_others() -> None:
    model = tiny()
    optimizer = BlockCoordinate(model, torch.optim.SGD, switch_every=1, order="greedy", lr=0.1)
    for step in range(6):
        reference = copy.deepcopy(model)
        for p in reference.parameters():
            p.requires_grad_(True)
        loss_of(reference, step).backward()
        found = dict(reference.named_parameters())
        norms = [sum(found[n].grad.double().square().sum().item() for n in block.names) for block in optimizer.blocks]
        active = optimizer.active_block
        loss_of(model, step).backward()
        assert {n for n, p in model.named_parameters() if p.grad is not None} == set(active.names)
        optimizer.step()
        assert optimizer.active_block is optimizer.blocks[max(range(len(norms)), key=norms.__getitem__)]
        optimizer.zero_grad()


def test_backward_goes_no_deeper_than_the_block() -> None:
    model = tiny()
    BlockCoordinate(model, AdamW8bit, order="fixed", start=3)
    reached = []
    for layer in model.layers:
        layer.up.register_full_backward_hook(lambda module, *_: reached.append(module))
    train(model, torch.optim.SGD(model.layers[2].parameters(), lr=0.0), range(1))
    assert reached == [model.layers[2].up]
