"""A step makes no temporary tensor the size of a parameter, whatever the shapes and layouts."""

from __future__ import annotations

import pytest
import torch

import memopt
from memopt.optim import make
from tests.optim.training import gradients

# 2 million elements in rows that no block divides, in one row, in rows shorter than a block, and turned.
RAGGED = [(1500, 1337), (700_001,), (20_011, 27), (333, 700)]


@pytest.mark.parametrize("name", ["adamw8bit", "adamw4bit", "adamwfp32", "lion8bit", "adagradbf16", "adamminifp32"])
def test_temporaries_stay_below_a_mebibyte(name: str) -> None:
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in RAGGED]
    params.append(torch.nn.Parameter(torch.zeros(900, 700).t()))
    optimizer = make(name, params)
    for step in range(3):
        gradients(params, step)
        with memopt.meter(optimizer=optimizer) as measured:
            optimizer.step()
        if step:  # the first allocates the states
            assert measured.by_category["temporaries"] < 2**20


def test_adam_minis_denominators_are_written_out_for_short_rows_alone() -> None:
    """4 bytes an element of the largest such parameter; every other layout makes no copy."""
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in (*RAGGED, (9000, 30))]
    params.append(torch.nn.Parameter(torch.zeros(900, 700).t()))
    optimizer = make("adammini8bit", params)
    for step in range(2):
        gradients(params, step)
        params[-1].grad = torch.zeros(900, 700).t()
        with memopt.meter(optimizer=optimizer) as measured:
            optimizer.step()
    assert measured.by_category["temporaries"] < 4 * params[2].numel() + 2**20
