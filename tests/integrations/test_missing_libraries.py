"""What a user reads who has not installed the library that an integration is for."""

from __future__ import annotations

import importlib
import sys

import pytest

import memopt
from memopt.integrations.needed import needed


@pytest.mark.parametrize(
    ("module", "library", "extra"), [("hf_trainer", "transformers", "hf"), ("lightning", "lightning", "lightning")]
)
def test_the_extra_to_install_is_named(monkeypatch: pytest.MonkeyPatch, module: str, library: str, extra: str) -> None:
    monkeypatch.delitem(sys.modules, f"memopt.integrations.{module}", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    expected = rf"works with {library}, which is not installed: pip install 'memopt\[{extra}\]'"
    with pytest.raises(ModuleNotFoundError, match=expected):
        importlib.import_module(f"memopt.integrations.{module}")
    if library == "transformers":
        with pytest.raises(ModuleNotFoundError, match=expected):
            _ = memopt.integrations.equip


def test_another_missing_module_is_not_blamed_on_the_library() -> None:
    with pytest.raises(ModuleNotFoundError, match="No module named 'no_such_module'"), needed("transformers", "hf"):
        importlib.import_module("no_such_module")


def test_modules_are_there_without_being_imported_first() -> None:
    assert memopt.integrations.checkpoints.Checkpoints
    with pytest.raises(AttributeError, match=r"no attribute .checkpoint.; it offers FusedLoss, .*, checkpoints"):
        _ = memopt.integrations.checkpoint
