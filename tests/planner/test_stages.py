"""The planner's folders are stages: each imports only from those before it, and no module from itself by a detour."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import memopt.planner

ROOT = Path(memopt.planner.__file__).parent


def imported(path: Path) -> set[str]:
    """The planner's parts (folders and files of its top) that a file imports."""
    names = [
        node.module
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module
    ]
    return {name.split(".")[2] for name in names if name.startswith("memopt.planner.")}


def test_stages_import_no_later_stage() -> None:
    graph: dict[str, set[str]] = {}
    for path in ROOT.rglob("*.py"):
        part = path.relative_to(ROOT).parts[0].removesuffix(".py")
        graph.setdefault(part, set()).update(imported(path) - {part})
    order = list(TopologicalSorter(graph).static_order())  # a circle would raise
    assert order[-1] == "__init__"
    stages = ["tracking", "tracing", "problem", "policy", "validation", "planning"]
    for stage in stages:
        later = stages[stages.index(stage) + 1 :]
        assert not graph[stage].intersection(later), stage
