"""Sizes as text."""

from __future__ import annotations

import pytest

from memopt.planner import BudgetError, format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (7, 7),
        ("4096", 4096),
        ("24GiB", 24 * 2**30),
        (" 1.5 mib ", 3 * 2**19),
        ("80GB", 80 * 10**9),
        ("2e3B", 2000),
        ("1TiB", 2**40),
        ("1e400GiB", 2**62),
    ],
)
def test_sizes_are_read(text: int | str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "lots", "24 Gigs", "-3GiB", "GiB", "1,5GiB", "nan", "0", "0.1B", 0, -5])
def test_what_is_no_size_is_refused_by_name(text: int | str) -> None:
    with pytest.raises(BudgetError, match="budget"):
        parse_bytes(text)


@pytest.mark.parametrize("value", [None, 1.5, True, b"1GiB"])
def test_other_types_are_refused(value: object) -> None:
    with pytest.raises(TypeError, match="limit must be"):
        parse_bytes(value, "limit")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (3 * 2**19, "1.5 MiB"),
        (24 * 2**30, "24.0 GiB"),
        (2**41, "2.0 TiB"),
    ],
)
def test_sizes_are_printed(size: int, text: str) -> None:
    assert format_bytes(size) == text
