"""The examples of contrastive and zeroth-order training, tiny, show what they are meant to."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from examples import contrastive, zeroth_order


def printed(capsys: pytest.CaptureFixture[str], main: Callable[..., None], **options: Any) -> str:
    main(**options)
    return capsys.readouterr().out


def column(table: str, unit: str) -> list[float]:
    return [float(number) for number in re.findall(rf"([\d.]+){unit}", table)]


def test_contrastive_training_takes_less_and_learns_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, contrastive.main, steps=4, batch=768, width=16, limit=2**18)
    plain, ours = column(out, " MiB")
    assert ours < 0.6 * plain
    losses = re.findall(r"│ +([\d.]+) │", out)
    printed_units = [int(loss.replace(".", "")) for loss in losses]  # the last place that the example prints, 1e-4
    assert abs(printed_units[1] - printed_units[0]) <= 1  # where rounding falls on either side


def test_zeroth_order_training_learns_in_less_memory(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, zeroth_order.main, steps=40, learned=60, batch=32, width=8, limit=300)
    *forward_only, with_gradients = column(out, " MiB")
    assert len(forward_only) == len(zeroth_order.VARIANTS)
    assert max(forward_only) < 0.7 * with_gradients
    rates = column(out, "%")
    before, after = rates[0], rates[1]
    assert after > before
