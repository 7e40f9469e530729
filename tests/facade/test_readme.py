"""The README's Python blocks run as printed, and its shell commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import memopt
from examples.gpt import GPT, GPTConfig
from memopt.cli import app

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def names() -> dict[str, object]:
    """What a reader of the README has already: a model, its loader, and one batch."""
    tokens = torch.randint(256, (2, 17))
    inputs = (tokens[:, :-1], tokens[:, 1:])
    return {
        "torch": torch,
        "memopt": memopt,
        "model": GPT(GPTConfig(layers=2, width=32, heads=2, context=16)),
        "loader": [inputs, inputs],
        "inputs": inputs,
        "hidden": torch.randn(6, 8, requires_grad=True),
        "weight": torch.randn(11, 8, requires_grad=True),
        "target": torch.randint(11, (6,)),
    }


@pytest.mark.parametrize("block", BLOCKS, ids=[f"block{n}" for n in range(len(BLOCKS))])
def test_python_block_runs(block: str) -> None:
    exec(compile(block, "README.md", "exec"), names())


def test_there_are_blocks_before_and_after() -> None:
    assert len(BLOCKS) >= 3


def test_commands_exist() -> None:
    shown = set(re.findall(r"^memopt (\w+)", README, flags=re.MULTILINE))
    assert shown == {command.name for command in app.registered_commands}
