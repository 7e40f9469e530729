"""Fixtures of the kernels' tests."""

from __future__ import annotations

import pytest


@pytest.fixture(params=("torch", "native"))
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMOPT_KERNELS", request.param)
