"""Decoding into a file, by one process or several, that goes on where it was stopped."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spiffy.cli.common import log, note_left_out, progress_bar
from spiffy.cli.decode_runs import as_json
from spiffy.schemas import SpiffyError

if TYPE_CHECKING:
    from spiffy.calib.answers import Answers
    from spiffy.calib.prompts import PromptSet
    from spiffy.calib.ranks import Ranks
    from spiffy.cli.decode_runs import Runs
    from spiffy.schemas import Budget, DraftGraph

_HOPELESS = 16  # failures one after the other: not for what is in their prompts


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
    most = max(_HOPELESS, 4 * batch_size)  # failures end first, whatever shares their forwards
    todo = [prompt for prompt in runs.prompts if prompt[0] not in answers.places]
    if len(todo) < len(runs.prompts):
        log.print(f"{len(runs.prompts) - len(todo)} of {len(runs.prompts)} answers are there")
    mine = todo[ranks.rank :: ranks.world]
    of = f" (rank {ranks.rank} of {ranks.world})" if ranks.world > 1 else ""
    with progress_bar() as bar, until_interrupted(log.print) as stopped:
        # What is in hand then is finished; nothing joins it.
        going_on = takewhile(lambda _: not stopped(), mine)
        finished = runs.together(going_on, runs.shown, batch_size)
        failures: list[dict[str, Any]] = []  # in a row, which may not be the prompts' fault
        for index, output in bar.track(
            finished, total=len(mine), description=f"decoding prompts{of}"
        ):
            if isinstance(output, str):
                failures.append(failed(index, output))
                if len(failures) == most:
                    raise SpiffyError(
                        f"{most} prompts in a row could not be decoded, the last one because: "
                        f"{output}; once that is mended, the same command goes on"
                    )
                continue
            _keep(failures, answers)
            answers.append(as_json(index, output))
        if stopped():
            raise KeyboardInterrupt
        _keep(failures, answers)


def _keep(failures: list[dict[str, Any]], answers: Answers) -> None:
    """Keep why prompts have no answer, and empty the list: they are not tried again."""
    for each in failures:
        answers.append(each)
    failures.clear()
