"""A run of `spiffy-bench`: what is measured, summed up and written."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from spiffy.cli.common import console, log, progress_bar
from spiffy.cli.streams import write
from spiffy.schemas import DraftGraph, SpiffyError
from spiffy.schemas.bench import Bench, DataRecord
from spiffy.schemas.errors import printable
from spiffy.schemas.io import write_atomically

if TYPE_CHECKING:
    from torch import Tensor

    from spiffy.bench.measure import Measurements
    from spiffy.bench.methods import Method
    from spiffy.calib.prompt_files import Text
    from spiffy.runtime import BlockEdges
    from spiffy.runtime.models import DiffusionLM
    from spiffy.schemas import CostProfile, DecodingSettings
    from spiffy.schemas.bench import Machine

FILES = ("bench.json", "rows.jsonl", "table.md", "report.html")
ROWS_SO_FAR = "rows.jsonl.part"


@dataclass(frozen=True)
class Run:
    """What is measured, on what.

    Attributes
    ----------
    texts, prompts, records
        Of every prompt: as it was read, as token ids, and what its dataset says besides.
    data
        As it is if nothing stops the run.
    compared_with
        Digests of what rivals draft by, by kind of method.
    costs_known
        Whether "auto" begins with costs measured before; None where it is not measured.
    """

    lm: DiffusionLM
    artifact: DraftGraph
    settings: DecodingSettings
    edges: BlockEdges
    methods: Sequence[Method]
    texts: Sequence[Text]
    prompts: Sequence[Tensor]
    records: Sequence[Any]
    data: DataRecord
    adapter: str | None
    compared_with: Mapping[str, str]
    costs_known: bool | None


def measured(
    run: Run, execute_code: bool, out: Path
) -> tuple[Measurements, KeyboardInterrupt | Exception | None]:
    """Decode, with a progress bar; also what stopped it early, if it has a prompt to show.

    Rows are in `out` once all methods have had a prompt: what is killed writes no more.
    """
    from spiffy.bench.measure import rounds, until_stopped

    ways, prompts, data = len(run.methods), len(run.prompts), run.data
    total = ways * (data.repeats * prompts + data.warm_up)
    what = run.lm, run.methods, run.prompts, run.records
    counts = data.repeats, data.warm_up, data.seed
    with progress_bar() as bar:
        line = bar.add_task(f"decoding by {ways} methods", total=total)
        parts = rounds(*what, *counts, run.edges, execute_code, lambda: bar.advance(line))
        return until_stopped(_kept(parts, out / ROWS_SO_FAR))


def _kept(parts: Iterable[Measurements], path: Path) -> Iterator[Measurements]:
    """The parts, each once its rows are on disk."""
    mode: Literal["w", "a"] = "w"
    for part in parts:
        with path.open(mode, encoding="utf-8") as file:
            file.write(_lines(part))
            file.flush()
            os.fsync(file.fileno())
        mode = "a"
        yield part


def summed_up(
    run: Run, found: Measurements, machine: Machine, profile: CostProfile | None
) -> Bench:
    """What is kept of a run."""
    from spiffy.bench.measure import overlap, results, walkthrough
    from spiffy.calib.pipeline import model_facts
    from spiffy.calib.prompt_files import question
    from spiffy.calib.prompts import prompt_digest
    from spiffy.calib.workdir import weights_digest

    artifact, edges, ours = run.artifact, run.edges, model_facts(run.lm).record()
    digests = map(prompt_digest, run.texts[: found.prompts])
    done = {
        "samples": found.prompts,
        "repeats": found.repeats,
        "stopped": (found.prompts, found.repeats) != (run.data.samples, run.data.repeats),
        "calibrated_on": overlap(digests, artifact.calibration.prompt_digests),
    }
    return Bench(
        command=shlex.join([Path(sys.argv[0]).name, *map(printable, sys.argv[1:])]),
        machine=machine,
        model=ours,
        weights=weights_digest(run.lm),
        adapter=None if run.adapter is None else printable(run.adapter),
        decoding=run.settings,
        edges=tuple(f.name for f in fields(edges) if getattr(edges, f.name)),
        graph_digest=artifact.digest(),
        graph_model=None if artifact.model == ours else artifact.model.id,
        compared_with=dict(run.compared_with),
        costs_known=run.costs_known,
        nodes=artifact.nodes,
        roots=artifact.calibration.roots,
        data=run.data.model_copy(update=done),
        baseline=run.methods[0].name,
        results=results(run.methods, found),
        profile=profile,
        walkthrough=walkthrough(run.lm, run.methods[0], question(run.texts[0]), found),
    )


def profile_of(run: Run) -> CostProfile | None:
    """What a forward costs here; known already if "auto" was measured."""
    from spiffy.runtime.budget.predict import auto_profile
    from spiffy.runtime.decode import make_task, median_task

    if run.artifact.differences(run.settings):
        return None
    tasks = (make_task(run.lm, ids, run.settings, edges=run.edges) for ids in run.prompts)
    return auto_profile(median_task(tasks), run.artifact)


def check_rival(paper: DraftGraph, settings: DecodingSettings, budgets: Sequence[int]) -> None:
    """Refuse a graph for --paper that is none of the paper's; say where it differs from ours."""
    objective = paper.calibration.objective
    if objective != "paper":
        raise SpiffyError(
            f"--paper: that graph was grown by --objective {objective}, not by the paper's rule: "
            "calibrate one with --objective paper"
        )
    if different := paper.differences(settings):
        log.print(
            f"--paper: other settings than that graph's: {', '.join(different)}; its drafts are "
            "accepted less often: calibrate it with these",
            soft_wrap=True,
        )
    if over := [str(n) for n in budgets if n > paper.budget]:
        log.print(
            f"--paper: that graph has {paper.budget} nodes, and is not measured with "
            f"{', '.join(over)} drafts",
            soft_wrap=True,
        )


def costs_known(
    lm: DiffusionLM,
    settings: DecodingSettings,
    edges: BlockEdges,
    artifact: DraftGraph,
    prompts: Sequence[Tensor],
) -> bool:
    """Whether forwards like these were timed on this machine before, so that "auto" knows them."""
    from spiffy.runtime.budget.cost import known_profile
    from spiffy.runtime.decode import make_task, median_task

    task = median_task(make_task(lm, ids, settings, edges=edges) for ids in prompts)
    return known_profile(task, artifact.cost_profiles) is not None


def write_rows(out: Path, found: Measurements) -> None:
    """Write every decode that was counted, a line each."""
    write_atomically(out / "rows.jsonl", _lines(found))
    (out / ROWS_SO_FAR).unlink(missing_ok=True)


def _lines(found: Measurements) -> str:
    return "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in found.rows)


def write_files(out: Path, summary: Bench) -> list[Path]:
    """Write what a run is summed up in; returns the files that people read."""
    from spiffy.bench.report import require_matplotlib, write_report
    from spiffy.bench.tables import markdown

    summary.save(out / "bench.json")
    write_atomically(out / "table.md", markdown(summary) + "\n")
    written = [out / "table.md"]
    try:
        require_matplotlib()
    except SpiffyError as missing:
        (out / "report.html").unlink(missing_ok=True)  # it would be of another run
        log.print(f"no report.html: {missing}", soft_wrap=True)
    else:
        write_report(summary, out / "report.html")
        written.append(out / "report.html")
    return written


def print_table(summary: Bench) -> None:
    """For people in a terminal, else as Markdown."""
    from spiffy.bench.tables import markdown, terminal_table

    if console.is_terminal:
        console.print(terminal_table(summary))
    else:
        write(markdown(summary) + "\n")
