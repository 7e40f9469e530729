"""The rules of the house: who may import whom, what is public, how long a file may be."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import memopt

PACKAGE = Path(memopt.__file__).parent
ROOMS = ("kernels", "optim", "planner", "offload")
GROUND = {"deprecation", "files", "native_build", "version"}  # leaves, which every room may stand on
ALLOWED = {
    "kernels": GROUND | {"kernels"},
    "optim": GROUND | {"optim", "kernels"},
    "planner": GROUND | {"planner"},
    "offload": GROUND | {"offload", "kernels", "planner"},
}
MAX_LINES = 400


def imported_rooms(path: Path) -> set[str]:
    """The second parts of every ``memopt.X`` that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "memopt":
                names = [f"memopt.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("memopt.")}
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_downwards(room: str) -> None:
    paths = sorted((PACKAGE / room).rglob("*.py"))
    assert paths
    for path in paths:
        assert imported_rooms(path) <= ALLOWED[room], path


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_stay_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize("name", ["memopt", *(f"memopt.{room}" for room in ROOMS)])
def test_public_names_exist_and_are_sorted(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__all__ == sorted(module.__all__)
    for public in module.__all__:
        assert getattr(module, public) is not None
        if callable(getattr(module, public)):
            assert getattr(module, public).__doc__, public


@pytest.mark.parametrize("room", ROOMS)
def test_top_level_links_lead_to_the_rooms(room: str) -> None:
    link = PACKAGE.parent / room
    assert link.is_symlink()
    assert link.resolve() == PACKAGE / room


def test_import_of_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, memopt; print(*sorted({m.split('.')[0] for m in sys.modules} & {'torch','triton','pulp','rich'}))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


def test_unknown_attribute_names_what_there_is() -> None:
    with pytest.raises(AttributeError, match=r"'nonsense'; it offers .*linear_cross_entropy"):
        _ = memopt.nonsense
