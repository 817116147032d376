"""What `spiffy-calibrate` does once a model is loaded: record, fit, measure, time; all in sight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from spiffy.calib.ranks import Ranks
from spiffy.cli.common import (
    doing,
    log,
    note_skipped,
    progress_bar,
)
from spiffy.cli.options import recording_option
from spiffy.schemas import SpiffyError
from spiffy.schemas.errors import said

if TYPE_CHECKING:
    from spiffy.calib.pipeline import Traces
    from spiffy.calib.prompts import PromptSet
    from spiffy.calib.workdir import WorkDir
    from spiffy.runtime.decode import Task
    from spiffy.runtime.models.base import DiffusionLM
    from spiffy.schemas import CostProfile, DraftGraph

_MUCH = 2e9  # bytes of traces in memory that are worth a word


@dataclass(frozen=True)
class Recording:
    """How the plain decodes are recorded."""

    batch_size: Annotated[int, recording_option(help="Prompts decoded together.")] = 8
    workdir: Annotated[
        Path | None,
        recording_option(
            help="Keep what is recorded here: after an interruption the same command goes on."
        ),
    ] = None
    shard: Annotated[
        str | None,
        recording_option(
            help="I/N: record only this share of the prompts (0/4 to 3/4), for "
            "'spiffy-calibrate merge'. Needs --workdir."
        ),
    ] = None

    def check(self, ranks: Ranks) -> None:
        """Refuse what cannot be, before anything is loaded."""
        if self.batch_size < 1:
            raise SpiffyError(f"--batch-size {self.batch_size}: must be at least 1")
        if self.workdir is None and (ranks.world > 1 or self.share() != (0, 1)):
            raise SpiffyError("several ranks or --shard: give --workdir, which they share")

    def share(self) -> tuple[int, int]:
        """Which of how many shards; (0, 1) is everything."""
        if self.shard is None:
            return 0, 1
        number, _, count = self.shard.partition("/")
        if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
            raise SpiffyError(
                f"--shard {self.shard}: must be I/N with I from 0 to N - 1, such as 0/4"
            )
        return int(number), int(count)


def note_left_out(drawn: PromptSet, problems: Sequence[str], repeated: Sequence[str]) -> None:
    """Say how many prompts are not recorded, and why."""
    note_skipped(drawn.skipped, drawn.dataset)
    if repeated:
        log.print(
            f"{len(repeated)} of {len(drawn.texts)} prompts repeat another one, and are "
            "not decoded again"
        )
    if problems:
        log.print(
            f"{len(problems)} of {len(drawn.texts)} prompts cannot be decoded and are left out; "
            f"what is wrong with the first: {problems[0]}",
            soft_wrap=True,
        )


def note_failed(failed: int, tasks: Sequence[Task]) -> None:
    """Say how many decodes failed, and why, if one of them was tried just now."""
    if failed:
        why = next((f"; the first of them: {said(t.error)}" for t in tasks if t.error), "")
        log.print(
            f"{failed} of {len(tasks)} prompts failed while they were decoded, and are left out"
            f"{why}",
            soft_wrap=True,
        )


def recorded(
    recording: Recording,
    model: DiffusionLM,
    drawn: PromptSet,
    tasks: Sequence[Task],
    ranks: Ranks,
) -> Traces | None:
    """Decode the prompts plainly; the traces, for the rank that has all of them."""
    if recording.workdir is not None:
        return _record_in_workdir(recording, recording.workdir, model, drawn, tasks, ranks)
    from spiffy.calib.pipeline import record

    # Every state is kept whole, and there is one for every token at most.
    size = sum(8 * task.canvas.length * task.settings.gen_length for task in tasks)
    if size > _MUCH:
        log.print(
            f"the states of {len(tasks)} prompts take up to {size / 1e9:.0f} GB of memory: with "
            "--workdir DIR they lie on disk, and nothing is lost if this is stopped",
            soft_wrap=True,
        )
    with progress_bar() as bar:
        line = bar.add_task("decoding prompts", total=len(tasks))
        traces = record(
            model, tasks, recording.batch_size, lambda done: bar.update(line, completed=done)
        )
    note_failed(len(traces.failed), tasks)
    return traces


def _record_in_workdir(
    recording: Recording,
    workdir: Path,
    model: DiffusionLM,
    drawn: PromptSet,
    tasks: Sequence[Task],
    ranks: Ranks,
) -> Traces | None:
    """Record this rank's share of the shard; the traces, for the rank that has all of them."""
    from spiffy.calib.pipeline import groups
    from spiffy.calib.workdir import WorkDir, manifest_of

    share, first = recording.share(), tasks[0]
    manifest = manifest_of(
        model, drawn, first.settings, len(tasks), recording.batch_size, first.seed, first.edges
    )
    with ranks.sharing(lambda: WorkDir(workdir, manifest, ranks.rank)) as work:
        _record_into(work, model, tasks, ranks, share)
    if ranks.rank > 0:
        return None
    number, count = share
    ours = [t for group in groups(tasks, work.manifest.batch_size)[number::count] for t in group]
    places = work.places if ranks.world == 1 else work.recorded(workdir, work.manifest)
    known = [places[task.sequence].about for task in ours if task.sequence in places]
    note_failed(sum(not about.is_decoded for about in known), ours)
    if share != (0, 1):
        log.print(
            f"recorded shard {number}/{count} in {workdir}; join with spiffy-calibrate merge",
            soft_wrap=True,
        )
        return None
    return work.traces()


def _record_into(
    work: WorkDir, model: DiffusionLM, tasks: Sequence[Task], ranks: Ranks, share: tuple[int, int]
) -> None:
    """Record what is missing of this shard and this rank, until done or interrupted."""
    from spiffy.calib.pipeline import groups
    from spiffy.calib.signals import until_interrupted

    for note in work.notes:
        log.print(note, soft_wrap=True)
    number, count = share
    ours = groups(tasks, work.manifest.batch_size)[number::count]
    numbers = {task.sequence for group in ours for task in group}
    todo = [group for group in work.missing(tasks) if group[0].sequence in numbers]
    left = sum(len(group) for group in todo)
    if left < len(numbers):
        log.print(f"{len(numbers) - left} of {len(numbers)} prompts are recorded already")
    mine = todo[ranks.rank :: ranks.world]
    of = f" (rank {ranks.rank} of {ranks.world})" if ranks.world > 1 else ""
    with progress_bar() as bar, until_interrupted(log.print) as stopped:
        line = bar.add_task(f"decoding prompts{of}", total=sum(map(len, mine)))
        work.record(model, mine, lambda done: bar.update(line, completed=done), stopped)
        if stopped():
            raise KeyboardInterrupt


@contextmanager
def fitting() -> Iterator[Callable[[int, int], None]]:
    """A bar for growing and fitting; call it with how many prompts are replayed, of how many."""
    with progress_bar() as bar:
        line = bar.add_task("growing and fitting", total=None)
        yield lambda done, of: bar.update(
            line, description="replaying held-out prompts", completed=done, total=of
        )


def measured(graph: DraftGraph, tasks: Sequence[Task], traces: Traces) -> DraftGraph:
    """The graph with steps per forward as held-out prompts have them, decoded with drafts."""
    from spiffy.calib.measure import decodes, measure_steps

    with progress_bar() as bar:
        most = decodes(graph, traces)
        line = bar.add_task("decoding held-out prompts with drafts", total=most)
        found = measure_steps(graph, tasks, traces, lambda: bar.advance(line))
        bar.update(line, completed=most)  # it ends sooner where that takes long
        return found


def timed(tasks: Sequence[Task], graph: DraftGraph) -> tuple[Task, CostProfile | None]:
    """The task of median length, and what forwards behind its prompt cost here."""
    from spiffy.runtime.budget.predict import auto_profile
    from spiffy.runtime.decode import median_task

    with doing("timing forwards"):
        task = replace(median_task(tasks), drafter=None, path=[])
        return task, auto_profile(task, graph) if graph.nodes else None
