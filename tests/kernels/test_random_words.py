"""Random words: uniform, the same wherever a shard begins, and no element's noise tells its neighbour's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from memopt.kernels.hashing import base_key, noise

COUNT, CELLS = 1 << 18, 16
CPU = torch.device("cpu")


def noises(slot: int, step: int = 3) -> Tensor:
    return noise(base_key(1, step, 5), 0, 1, COUNT, slot, CPU)[0].double()


def chi_square(first: Tensor, second: Tensor) -> float:
    """Of pairs over cells of equal size; in standard deviations from what it is expected to be."""
    cells = ((first + 0.5) * CELLS).long() * CELLS + ((second + 0.5) * CELLS).long()
    counts = torch.bincount(cells, minlength=CELLS**2).double()
    expected, freedom = counts.sum() / CELLS**2, CELLS**2 - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


@pytest.mark.parametrize("slot", [0, 1])
def test_neighbours_and_steps_are_independent(slot: int) -> None:
    """Five standard deviations: one test of three million says more of independent numbers."""
    here = noises(slot)
    assert abs(float(here.mean())) <= 5 / math.sqrt(12 * COUNT)
    for lag in (1, 2, 3, 16, 256, 4096):
        assert chi_square(here[:-lag], here[lag:]) <= 5, lag
    assert chi_square(here, noises(slot, step=4)) <= 5
    assert chi_square(here, noises(1 - slot)) <= 5


def test_words_follow_the_global_index() -> None:
    whole, base = noises(0), base_key(1, 3, 5)
    rows = noise(base, 512, 2, 1000, 0, CPU).double()
    assert torch.equal(rows.flatten(), whole[512:2512])
    assert torch.equal(noise(base, 0, 1, 100, 0, CPU, column=77)[0].double(), whole[77:177])
