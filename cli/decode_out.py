"""Decoding into a file, by one process or several, that goes on where it was stopped."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spiffy.cli.common import log, note_left_out, progress_bar
from spiffy.cli.decode_runs import as_json
from spiffy.schemas import SpiffyError
from spiffy.schemas.errors import is_out_of_memory, said

if TYPE_CHECKING:
    from spiffy.calib.answers import Answers
    from spiffy.calib.prompts import PromptSet
    from spiffy.calib.ranks import Ranks
    from spiffy.cli.decode_runs import Runs
    from spiffy.schemas import Budget, DraftGraph

_MANY = 16  # prompts that do not fit into memory, after which it is asked whether others do


def decode_into(
    out: Path,
    runs: Runs,
    prompts: PromptSet,
    graph: DraftGraph | None,
    budget: Budget | None,
    ranks: Ranks,
    batch_size: int,
) -> None:
    """Decode this rank's share of the prompts; rank 0 then writes the answers of all.

    Raises
    ------
    SpiffyError
        If answers on their way to the file are to other prompts or of other settings, or another
        process writes them, or they cannot be written.
    KeyboardInterrupt
        If asked to stop, after the prompts in hand.
    """
    from spiffy.calib.answers import Answers, answers_manifest

    manifest = answers_manifest(
        runs.lm,
        prompts,
        runs.settings,
        graph if budget is not None else None,
        budget,
        runs.stop,
        runs.seed,
        runs.edges,
    )
    with ranks.sharing(lambda: Answers(out, manifest, ranks.rank)) as answers:
        _decode_missing(runs, answers, ranks, batch_size)
    if ranks.rank == 0:
        sums, failed = answers.merge([number for number, _ in runs.prompts])
        for number, problem in failed.items():
            note_left_out(number, problem)
        log.print(
            f"wrote {sums['answers']} answers to {out}: {sums['tokens']} tokens, {sums['nfe']} "
            f"forwards, {sums['positions_computed']} positions, "
            f"{sums['steps'] / sums['nfe']:.2f} steps per forward",
            soft_wrap=True,
        )


def _decode_missing(runs: Runs, answers: Answers, ranks: Ranks, batch_size: int) -> None:
    from spiffy.calib.answers import failed
    from spiffy.calib.signals import until_interrupted

    for note in answers.notes:
        log.print(note, soft_wrap=True)
    todo = [prompt for prompt in runs.prompts if prompt[0] not in answers.places]
    if len(todo) < len(runs.prompts):
        log.print(f"{len(runs.prompts) - len(todo)} of {len(runs.prompts)} answers are there")
    mine = todo[ranks.rank :: ranks.world]
    of = f" (rank {ranks.rank} of {ranks.world})" if ranks.world > 1 else ""
    waiting: list[dict[str, Any]] = []  # for which memory did not suffice

    def keep() -> None:
        """Keep why these have no answer, so that they are not tried again.

        Unless memory is short for all: then it is not their length, and another time they fit.
        """
        if waiting and not runs.fits(min(runs.prompts, key=lambda p: len(p[1])), runs.shown):
            raise SpiffyError(
                f"not even the shortest prompt fits into memory now ({waiting[-1]['error']}): the "
                "same command goes on once it does"
            )
        for each in waiting:
            answers.append(each)
        waiting.clear()

    with progress_bar() as bar, until_interrupted(log.print) as stopped:
        # What is in hand then is finished; nothing joins it.
        going_on = takewhile(lambda _: not stopped(), mine)
        finished = runs.together(going_on, runs.shown, batch_size)
        for index, output in bar.track(
            finished, total=len(mine), description=f"decoding prompts{of}"
        ):
            if not isinstance(output, Exception):
                answers.append(as_json(index, output))
            elif is_out_of_memory(output):
                waiting.append(failed(index, said(output)))
                if len(waiting) == _MANY:
                    keep()
            else:
                answers.append(failed(index, said(output)))
        if stopped():
            raise KeyboardInterrupt
        keep()
