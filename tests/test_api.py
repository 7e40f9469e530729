"""The public names and their signatures, pinned. After a change that is meant: ``python -m tests.test_api``."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest
from packaging.version import Version

import memopt
from memopt.deprecation import RENAMED, Renamed

PINNED = Path(__file__).with_name("api.txt")
MODULES = (
    "memopt",
    "memopt.integrations",
    "memopt.integrations.checkpoints",
    "memopt.kernels",
    "memopt.offload",
    "memopt.optim",
    "memopt.planner",
    "memopt.report",
)


def signature(value: object) -> str:
    """Parameter names, kinds and defaults, without annotations."""
    try:
        found = inspect.signature(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return ""
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()]
    text = str(found.replace(parameters=plain, return_annotation=inspect.Signature.empty))
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def public_names() -> str:
    """One line a name, sorted within each module."""
    lines = []
    for module in map(importlib.import_module, MODULES):
        for name in module.__all__:
            value = getattr(module, name)
            lines.append(f"{module.__name__}.{name}{signature(value) if callable(value) else ''}")
    return "\n".join(lines) + "\n"


def test_public_names_and_signatures_are_those_pinned() -> None:
    assert public_names() == PINNED.read_text(encoding="utf-8")


def test_a_renamed_name_works_for_one_release_and_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RENAMED, "memopt.optim.Adam8", Renamed("memopt.optim:Adam8bit", "0.3"))
    with pytest.warns(FutureWarning, match=r"memopt.optim.Adam8 is now memopt.optim.Adam8bit; .* goes in memopt 0.3"):
        assert memopt.optim.Adam8 is memopt.optim.Adam8bit
    with pytest.raises(AttributeError, match="no attribute 'Adam9'; it offers AdEMAMix"):
        _ = memopt.optim.Adam9


def test_old_names_leave_when_their_release_is_out() -> None:
    now = Version(memopt.__version__)
    assert [name for name, moved in RENAMED.items() if Version(moved.until) <= now] == []


if __name__ == "__main__":
    PINNED.write_text(public_names(), encoding="utf-8")
