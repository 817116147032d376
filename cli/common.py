"""What the commands share: errors in one line, progress, the model of a graph, its prompts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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

from spiffy.schemas import DecodingSettings, DraftGraph, SpiffyError

if TYPE_CHECKING:
    from spiffy.runtime import BlockEdges
    from spiffy.runtime.models import DiffusionLM

#: Results go to standard output, everything else to standard error.
console = Console(markup=False, emoji=False)
log = Console(stderr=True, highlight=False, markup=False, emoji=False)


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


DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
DtypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16, float64.")]
SkipBadOption = Annotated[
    bool,
    typer.Option("--skip-bad", help="Leave out broken lines of a JSONL file, and say how many."),
]
EdgesOption = Annotated[
    str,
    typer.Option(
        help="What may happen where a block ends; changes the cost, never the tokens: all, none, "
        "or a list such as fold,first. complete: drafts may complete a block. first: a block's "
        "first forward may carry drafts. fold: it stores the block before (cache block)."
    ),
]


def block_edges(words: str) -> BlockEdges:
    """Read what `--edges` allows.

    Raises
    ------
    SpiffyError
        If a word is unknown.
    """
    from spiffy.runtime import BlockEdges

    known = [switch.name for switch in fields(BlockEdges)]
    allowed = [word.strip() for word in words.split(",")]
    if allowed == ["all"] or allowed == ["none"]:
        allowed = known if allowed == ["all"] else []
    for word in allowed:
        if word not in known:
            raise SpiffyError(
                f"--edges {words!r}: {word!r} does not belong there: give all, none, or a list of "
                f"{', '.join(known)}"
            )
    return BlockEdges(**{name: name in allowed for name in known})


def note_if_inexact(settings: DecodingSettings) -> None:
    """Say so wherever the one cache shows up that is not exact."""
    if not settings.exact:
        log.print("cache prefix is near-lossless: drafts see the root's suffix, not their own")


def note_skipped(lines: int, dataset: str) -> None:
    """Say how many lines of a file were left out."""
    if lines:
        log.print(f"{lines} broken lines of {dataset} left out", soft_wrap=True)


def model_of(artifact: DraftGraph, path: Path | None, device: str, dtype: str) -> DiffusionLM:
    """The model a graph was calibrated for: by its id, or the checkpoint folder the graph is in."""
    from spiffy.runtime import load_model

    if path is not None and (path.parent / "config.json").is_file():
        return load_model(str(path.parent), device=device, dtype=dtype)
    record = artifact.model
    return load_model(record.id, device=device, dtype=dtype, revision=record.revision)


def decodable(
    lm: DiffusionLM, settings: DecodingSettings, texts: list[str]
) -> list[tuple[int, str]]:
    """Prompts that can be decoded, numbered from 0; the others are named and left out."""
    from spiffy.runtime.generate import make_task

    prompts = []
    for index, text in enumerate(texts):
        try:
            make_task(lm, text, settings)
        except SpiffyError as problem:
            if len(texts) == 1:
                raise
            log.print(f"prompt {index} left out: {problem}", soft_wrap=True)
        else:
            prompts.append((index, text))
    if not prompts:
        raise SpiffyError(f"none of the {len(texts)} prompts can be decoded")
    return prompts


def warn_of_differences(artifact: DraftGraph, settings: DecodingSettings) -> None:
    """Say what of the artifact does not hold here: settings, an acceptance model it cannot read."""
    from spiffy.runtime.acceptance import acceptance_of

    if artifact.acceptance is not None and acceptance_of(artifact) is None:
        log.print(
            "the graph's acceptance model was fitted by another version, with features that this "
            "one does not have: its nodes are the drafts; calibrate again",
            soft_wrap=True,
        )
    if different := artifact.differences(settings):
        log.print(
            f"other settings than the graph's: {', '.join(different)}; its expected steps do not "
            "hold, --budget auto will not draft: calibrate with these",
            soft_wrap=True,
        )


def run_app(app: Callable[[], None]) -> None:
    """Run a typer app; bad input ends in one line and exit code 2."""
    try:
        app()
    except SpiffyError as error:
        log.print(f"error: {error}", soft_wrap=True)
        sys.exit(2)
    except (RuntimeError, MemoryError) as error:
        # torch's, which is not imported here; its allocator on CPUs has no error of its own
        named = type(error).__name__ in ("OutOfMemoryError", "MemoryError")
        if not named and "DefaultCPUAllocator" not in str(error):
            raise
        log.print("error: out of memory: lower --budget, or use a cache (--cache dual)")
        sys.exit(2)
