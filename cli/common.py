"""What the commands share: errors in one line, progress, version."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib.metadata import version

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from spiffy.schemas import SpiffyError

#: Results go to standard output, everything else to standard error.
console = Console()
log = Console(stderr=True, highlight=False)


def progress_bar() -> Progress:
    """Show done, total, elapsed and remaining time, on standard error."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=log,
    )


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"spiffy-dllm {version('spiffy-dllm')}")
        raise typer.Exit


VERSION_OPTION = typer.Option(
    "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
)


def run_app(app: Callable[[], None]) -> None:
    """Run a typer app; bad input ends in one line and exit code 2, interruption in 130."""
    try:
        app()
    except SpiffyError as error:
        log.print(f"error: {error}", markup=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        log.print("interrupted: nothing was written")
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
