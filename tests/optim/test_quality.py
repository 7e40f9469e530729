"""What the formats promise: the bounds of the two probes, on smaller runs of the benchmark's own functions."""

from __future__ import annotations

import statistics

import pytest

from benchmarks.optimizer_quality import heavy_tails, least_squares

# Largest ratio of final losses to fp32's, and mean distance to fp32 in units of lr under student-t gradients.
PROMISED = {"bf16": (1.02, 0.05), "8bit": (1.03, 0.15), "8bit-dynamic": (1.06, 0.15), "4bit": (1.08, 2.1)}


@pytest.mark.parametrize("state", PROMISED)
def test_least_squares_ends_where_fp32_does(state: str) -> None:
    found, wide = (statistics.mean(least_squares(kept, seed) for seed in range(5)) for kept in (state, "fp32"))
    assert found <= PROMISED[state][0] * wide


@pytest.mark.parametrize("state", PROMISED)
def test_heavy_tailed_gradients_stay_near_fp32(state: str) -> None:
    mean, _ = heavy_tails(state, seed=0)
    assert mean <= PROMISED[state][1]
