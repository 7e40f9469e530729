"""Every public name says what it does and what each of its arguments is, and stands on a page of the reference."""

from __future__ import annotations

import enum
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from memopt.optim.registry import optimizers
from tests.test_api import MODULES

PAGES = Path(__file__).parents[1] / "docs" / "api"
SHORT = {name for name, kind in optimizers().items() if kind.__module__ == "memopt.optim"}  # AdamW8bit and the like


def public() -> Iterator[tuple[str, Any]]:
    for module in map(importlib.import_module, MODULES):
        for name in module.__all__:
            value = getattr(module, name)
            if name not in SHORT and not inspect.ismodule(value) and callable(value):
                yield f"{module.__name__}.{name}", value


def arguments(value: Any) -> list[str]:
    """Of a call; none where only the library itself makes the thing."""
    if inspect.isclass(value) and issubclass(value, (BaseException, enum.Enum, Protocol)):
        return []
    return [name for name in inspect.signature(value).parameters if not name.startswith("_")]


def unnamed(value: Any) -> list[str] | str:
    """The arguments that a docstring passes over."""
    text = inspect.getdoc(value) or ""
    if not text or text.startswith(f"{value.__name__}("):
        return "no docstring, or the one that dataclasses generate"
    return [name for name in arguments(value) if not re.search(rf"\b{name}\b", text, flags=re.IGNORECASE)]


def test_docstrings_name_every_argument() -> None:
    assert {path: found for path, value in public() if (found := unnamed(value))} == {}


@pytest.mark.parametrize("module", [m for m in MODULES if m != "memopt.integrations.checkpoints"])
def test_public_names_are_on_the_page_of_their_module(module: str) -> None:
    page = (PAGES / f"{module.split('.')[-1]}.md").read_text(encoding="utf-8")
    shown = {path.split(".")[-1] for path in re.findall(r"^::: (\S+)$", page, flags=re.MULTILINE)}
    offered = importlib.import_module(module)
    names = {name for name in offered.__all__ if not name.startswith("__")} - SHORT
    if module == "memopt":
        names = {name for name in names if not inspect.ismodule(getattr(offered, name))}
    assert sorted(names - shown) == []
