"""Models that look at values: what a trace knows, and what it assumes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from memopt.planner import trace


class Asks(nn.Module):
    """A layer, then whatever the test does with its output and the second input."""

    def __init__(self, then: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.then = nn.Linear(8, 8), then

    def forward(self, x: Tensor, values: Tensor) -> Tensor:
        return self.then(self.layer(x), values)


X = torch.ones(6, 8)
HALF = torch.tensor([True, False, True, False, True, False])


def output_bytes(then: Callable[[Tensor, Tensor], Tensor], values: Tensor, operation: str) -> int:
    traced = trace(Asks(then), (X, values))
    index = next(op.index for op in traced.ops if op.name.startswith(f"aten.{operation}."))
    return sum(storage.bytes for storage in traced.storages if storage.producer == index)


def test_masks_of_real_inputs_select_what_they_select() -> None:
    assert output_bytes(lambda y, m: y[m].sum(), HALF, "index") == 3 * 8 * 4
    assert output_bytes(lambda y, m: y.masked_select(m.unsqueeze(-1)).sum(), HALF, "masked_select") == 3 * 8 * 4
    assert output_bytes(lambda y, m: y[m.nonzero().squeeze(-1)].sum(), HALF, "nonzero") == 3 * 8
    assert output_bytes(lambda y, m: y[(m == 2) | (m == 5)].sum(), torch.arange(6), "index") == 2 * 8 * 4


def test_masks_of_unknown_values_select_everything() -> None:
    unknown = torch.empty(6, dtype=torch.bool, device="meta")
    assert output_bytes(lambda y, m: y[m].sum(), unknown, "index") == 6 * 8 * 4
    assert output_bytes(lambda y, m: y[y > 0].sum(), HALF, "index") == 6 * 8 * 4


def test_python_branches_on_real_values_are_taken() -> None:
    def branch(y: Tensor, lengths: Tensor) -> Tensor:
        return y[: int(lengths.max())].exp().sum() if (lengths > 3).any() else y.sum()

    assert output_bytes(branch, torch.tensor([1, 4]), "exp") == 4 * 8 * 4
    traced = trace(Asks(branch), (X, torch.tensor([1, 2])))
    assert not any(op.name.startswith("aten.exp.") for op in traced.ops)


def test_numbers_without_values_are_harmless() -> None:
    def divided(y: Tensor, _: Tensor) -> Tensor:
        return (y / y.sum().item())[int(y.argmax().item() * 0)].sum()

    assert trace(Asks(divided), (X, HALF)).peak_bytes > 0


def test_routing_is_balanced() -> None:
    def routed(y: Tensor, _: Tensor) -> Tensor:
        chosen = y.topk(2, -1).indices
        return torch.stack([y[(chosen == expert).any(-1)].sum() for expert in range(8)]).sum()

    traced = trace(Asks(routed), (X, HALF))
    gathers = [op.index for op in traced.ops if op.name.startswith("aten.index.") and op.phase.value == "forward"]
    sizes = [sum(s.bytes for s in traced.storages if s.producer == index) for index in gathers]
    # 6 rows with 2 of 8 experts each: 12 places, spread evenly
    assert sum(sizes) == 12 * 8 * 4
    assert max(sizes) <= 2 * 8 * 4


def test_real_tensors_of_the_user_are_not_written() -> None:
    counts = torch.zeros(6, dtype=torch.long)

    def counted(y: Tensor, values: Tensor) -> Tensor:
        values.add_(1)
        counts.add_(1)
        return y.sum()

    given = torch.zeros(6, dtype=torch.long)
    trace(Asks(counted), (X, given))
    assert given.sum() == 0
    assert counts.sum() == 0


@pytest.mark.parametrize("mask_is_full", [True, False])
def test_all_decides_on_real_masks(mask_is_full: bool) -> None:
    def padded(y: Tensor, mask: Tensor) -> Tensor:
        return y.sum() if mask.all() else (y * mask.unsqueeze(-1)).sum()

    mask = torch.ones(6, dtype=torch.bool) if mask_is_full else HALF
    names = [op.name for op in trace(Asks(padded), (X, mask)).ops]
    assert ("aten.mul.Tensor" in names) != mask_is_full
