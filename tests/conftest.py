"""Shared by every test: fixed seeds, and no cache of the machine's user."""

from __future__ import annotations

import sys

import pytest
import torch

# The checkout's link ``kernels`` is no package of that name: transformers would import memopt.kernels a second time.
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
