"""Every documentation page runs as printed, and the site builds without a warning."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from memopt.cli import app
from tests.integrations import pages

# The README has a test of its own, which brings what its reader has already.
PAGES = [page for page in pages.pages()[1:] if any(block.language == "python" for block in pages.blocks(page))]
RUN = sorted({command for page in pages.pages() for command in pages.commands(page) if command.startswith(pages.RUN)})
LOOKED_UP = sorted({c for page in pages.pages() for c in pages.commands(page) if not c.startswith(pages.RUN)})
TARGETS = set(re.findall(r"^([a-z]+):", (pages.ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_blocks_run(page: Path, tmp_path: Path) -> None:
    pages.in_fresh_process(tmp_path, pages.run_blocks, page, {})


@pytest.mark.parametrize("command", RUN)
def test_commands_run(command: str, tmp_path: Path) -> None:
    (tmp_path / "buffers.csv").write_text("id,lower,upper,size\na,0,4,512\nb,2,8,1024\nc,4,8,512\n")
    pages.in_fresh_process(tmp_path, pages.run_command, command)


@pytest.mark.parametrize("command", LOOKED_UP)
def test_other_commands_exist(command: str) -> None:
    """Those that take long, install or start several processes: the file, module or target they name is there."""
    words = [word for word in command.split() if "=" not in word]
    if words[0] == "make":
        assert set(words[1:]) <= TARGETS
    elif words[0] == "memopt":
        assert words[1] in {known.name for known in app.registered_commands} | {"--help", "--version"}
    elif "-m" in words and "pip" not in words and "venv" not in words and "pytest" not in words:
        assert importlib.util.find_spec(words[words.index("-m") + 1]), command
    elif words[0] == "torchrun":
        scripts = [word for word in words if word.endswith(".py")]
        assert scripts
        assert all((pages.ROOT / script).is_file() for script in scripts)
    else:
        assert any(name in command for name in ("pip", "venv", "pytest")), f"{command}: no test knows this command"


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=pages.ROOT, capture_output=True, text=True, env={"NO_MKDOCS_2_WARNING": "1"})
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
