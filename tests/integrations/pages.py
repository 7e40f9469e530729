"""README and docs pages as programs: their ``python`` blocks and their shell commands, run in fresh processes.

A page's ``python`` blocks run in order in one namespace, as a reader would paste them. Its shell commands (``bash``
blocks, and the ``$`` lines of ``console`` blocks) that call memopt or an example run in the same folder afterwards.
What cannot run on any machine is fenced ``text``. Processes are forked from one that has imported torch and nothing
else, so that a page costs what it does and not the import.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import re
import runpy
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LIMIT_SECONDS = 120
FENCE = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
RUN = ("memopt plan", "memopt place", "memopt probe", "python -m examples.")  # others are only looked up


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, its text, and the line of the page on which the text begins."""

    language: str
    text: str
    line: int


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        yield Block(found[1], found[2], text.count("\n", 0, found.start(2)) + 1)


def commands(page: Path) -> list[str]:
    """Every shell command of a page, without its comment; continued lines are joined."""
    found = []
    for block in blocks(page):
        text = block.text.replace("\\\n", " ")
        if block.language == "console":
            text = "\n".join(line[2:] for line in text.splitlines() if line.startswith("$ "))
        elif block.language not in ("bash", "sh", "shell"):
            continue
        found += [shlex.join(words) for line in text.splitlines() if (words := shlex.split(line, comments=True))]
    return found


def run_blocks(page: Path, names: dict[str, Any]) -> None:
    """The page's ``python`` blocks, one after the other; line numbers of a traceback are the page's."""
    warnings.simplefilter("error")  # not for commands: a reader's shell does not do so either
    namespace = {"__name__": "__main__", **names}
    for block in blocks(page):
        if block.language == "python":
            exec(compile("\n" * (block.line - 1) + block.text, page.name, "exec"), namespace)


def run_command(command: str) -> None:
    """One command of a page as its console script or module would run it; a failing exit status raises."""
    words = shlex.split(command)
    try:
        if words[0] == "memopt":
            from memopt.cli import main

            sys.argv = words
            main()
        else:
            sys.argv = words[2:]
            runpy.run_module(words[2], run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        if stop.code:
            raise RuntimeError(f"{command}: exit status {stop.code}") from stop


def _serve(pipe: Connection, folder: str, work: Callable[..., None], *args: Any) -> None:
    os.chdir(folder)
    output, failure = io.StringIO(), ""
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            work(*args)
        except BaseException:
            failure = traceback.format_exc() + output.getvalue()
    pipe.send(failure)


def in_fresh_process(folder: Path, work: Callable[..., None], *args: Any) -> None:
    """Call ``work(*args)`` in a process of its own whose current folder is ``folder``.

    Raises:
        AssertionError: it failed, took more than ``LIMIT_SECONDS`` or died; with its traceback and output.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(theirs, str(folder), work, *args), daemon=False)
    process.start()
    theirs.close()
    try:
        failure = ours.recv() if ours.poll(LIMIT_SECONDS) else f"not done after {LIMIT_SECONDS} s"
    except EOFError:
        failure = "the process died"
    finally:
        process.kill()
        process.join()
        ours.close()
    assert not failure, failure
