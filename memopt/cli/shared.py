"""What the commands share: their help page, their exit status, options of several, and progress on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

BAD_INPUT = 1
NOTHING_FITS = 2
INTERRUPTED = 130
FLAG = ""  # no type beside options that take no value

Out = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the result to this file.")]


class _PlainHelp:
    """Shows --help as a flag like the others, in the panel of the last option."""

    def get_help_option(self, ctx: Any) -> Any:
        option = super().get_help_option(ctx)  # type: ignore[misc]
        if option is not None:
            option.metavar = FLAG
            last: Any = self.params[-1] if self.params else None  # type: ignore[attr-defined]
            option.rich_help_panel = getattr(last, "rich_help_panel", None)
        return option


class Command(_PlainHelp, typer.core.TyperCommand):
    """One command of the program."""


class Group(_PlainHelp, typer.core.TyperGroup):
    """The program, which is its commands."""


@contextmanager
def progress(text: str) -> Iterator[Callable[[str], None]]:
    """On a terminal: what is being done and for how long, on stderr, gone when it is over. Gives what changes it."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
        task = shown.add_task(text, total=None)
        yield lambda text: shown.update(task, description=text)
