"""The program: its commands, and what becomes of every error and of an interruption."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import typer

from memopt.cli.measure import bench_command, probe_command
from memopt.cli.place import place_command
from memopt.cli.plan import plan_command
from memopt.cli.shared import BAD_INPUT, FLAG, INTERRUPTED, Command, Group

_USAGE: Any = typer.BadParameter.__mro__[2]  # options that cannot be read: click's own class, wherever typer has it
COMMANDS: dict[str, tuple[Callable[..., None], str]] = {  # in the order of the help page, each with an example
    "plan": (plan_command, "memopt plan llama-3-8b --hardware rtx-4090 --budget 24GiB --fit"),
    "place": (place_command, "memopt place buffers.csv --out placed.csv"),
    "probe": (probe_command, "memopt probe --out machine.json"),
    "bench": (bench_command, "memopt bench"),
}

app = typer.Typer(
    name="memopt",
    cls=Group,
    help="Train PyTorch models that do not fit in memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _name, (_run, _example) in COMMANDS.items():
    app.command(_name, cls=Command, epilog=f"Example: {_example}")(_run)


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", metavar=FLAG, help="Print the version and stop.")] = False,
) -> None:
    if version:
        from memopt.version import __version__

        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line; bad input is one clear line on stderr and exit status 1, never a traceback."""
    try:
        status = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        _stop("interrupted", INTERRUPTED)
    except BrokenPipeError:  # whoever read the output has seen enough; Python flushes what is left at exit
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        raise SystemExit(BAD_INPUT) from None
    except _USAGE as error:
        _stop(error.format_message(), BAD_INPUT)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        _stop(str(error), BAD_INPUT)
    raise SystemExit(status or 0)


def _stop(message: str, status: int) -> NoReturn:
    sys.stderr.write(f"memopt: {' '.join(message.split())}\n")
    raise SystemExit(status)
