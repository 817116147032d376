"""`spiffy-calibrate`: from a model and prompts to a draft graph."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from spiffy.cli.common import (
    VERSION_OPTION,
    DeviceOption,
    DtypeOption,
    EdgesOption,
    SkipBadOption,
    block_edges,
    console,
    log,
    note_if_inexact,
    note_skipped,
    progress_bar,
    run_app,
)
from spiffy.schemas import SpiffyError
from spiffy.schemas.graph import MAX_NODES
from spiffy.schemas.io import check_writable

if TYPE_CHECKING:
    from spiffy.calib.pipeline import Traces
    from spiffy.calib.ranks import Ranks
    from spiffy.calib.workdir import WorkDir
    from spiffy.runtime.decode import Task
    from spiffy.runtime.models.base import DiffusionLM
    from spiffy.schemas import CostProfile, DraftGraph, Objective
    from spiffy.schemas.workdir import Manifest

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
merge_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

BudgetOption = Annotated[int, typer.Option(help="Drafts per forward that the graph may hold.")]
ObjectiveOption = Annotated[
    Literal["expected-steps", "paper"],
    typer.Option(
        help="expected-steps (steps that drafts save), or paper (degree-1 accumulation, in the "
        "reading that did best)."
    ),
]
INTERRUPTED = 130

_MOST_COMPARED = 200_000  # distinct chains; the paper's rule unpacks each, 2 kB and 40 microseconds
_SHOWN_BUDGETS = (1, 2, 4, 8, 16, 32, 64, 128)


def _list_models(wanted: bool) -> None:
    if not wanted:
        return
    from spiffy.runtime import ALIASES

    width = max(map(len, ALIASES))
    for alias, place in ALIASES.items():
        shown = place if place.count("/") == 1 else "ships with the package"
        typer.echo(f"{alias:{width}} {shown}")
    raise typer.Exit


@app.command()
def calibrate(
    model: Annotated[
        str, typer.Option(help="Alias (tiny-llada, llada-8b, ...), hub id, or checkpoint folder.")
    ],
    budget: BudgetOption = 32,
    dataset: Annotated[
        str,
        typer.Option(
            help="synthetic, gsm8k, humaneval, mbpp, math500, or a JSONL file with a 'prompt' or "
            "'question' field."
        ),
    ] = "synthetic",
    samples: Annotated[
        int, typer.Option(help="Prompts to decode; every fifth is held out to measure the graph.")
    ] = 50,
    policy: Annotated[
        str | None, typer.Option(help="Unmasking policy: static, threshold or sequential.")
    ] = None,
    tokens_per_step: Annotated[
        int | None, typer.Option(help="Tokens that a static step commits (default 1).")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Confidence that commits at once (default 0.9).")
    ] = None,
    block_length: Annotated[
        int | None, typer.Option(help="Positions per block (default 32; SDAR: the model's own).")
    ] = None,
    gen_length: Annotated[
        int | None, typer.Option(help="Positions reserved for the answer (default 256).")
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(
            help="none, dual, prefix (near-lossless), or block (SDAR's, and its default)."
        ),
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0 decodes greedily (default).")] = None,
    seed: Annotated[int, typer.Option(help="Draws the prompts, and the noise if any.")] = 0,
    objective: ObjectiveOption = "expected-steps",
    batch_size: Annotated[int, typer.Option(help="Prompts decoded together.")] = 8,
    edges: EdgesOption = "all",
    skip_bad: SkipBadOption = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    device_map: Annotated[
        str | None,
        typer.Option(help="auto, balanced, ...: spread a model over devices (needs accelerate)."),
    ] = None,
    workdir: Annotated[
        Path | None,
        typer.Option(
            help="Keep what is recorded here: after an interruption the same command goes on."
        ),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            help="I/N: record only this share of the prompts (0/4 to 3/4), for "
            "'spiffy-calibrate merge'. Needs --workdir."
        ),
    ] = None,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile",
            help="Store this machine's forward times in the artifact (not part of its digest).",
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Artifact to write. Default: draft_graph.json in a local checkpoint folder, else "
            "<alias>.json."
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(help='Also write an HTML page about the artifact (extra "report").'),
    ] = None,
    list_models: Annotated[
        bool,
        typer.Option(
            "--list-models",
            callback=_list_models,
            is_eager=True,
            help="Print the aliases and exit.",
        ),
    ] = False,
    version: Annotated[bool, VERSION_OPTION] = False,
) -> None:
    """Calibrate a draft graph: record which future states come true, keep those worth drafting.

    Decodes prompts plainly, records for every state which future states it led to, grows the graph
    that would have saved most forwards, and measures it on held-out prompts.

    Example: spiffy-calibrate --model tiny-llada --budget 32 --out llada.json

    Work directories (--workdir) recorded apart are joined by spiffy-calibrate merge (see its
    --help).
    """
    if not 1 <= budget <= MAX_NODES:
        raise SpiffyError(f"--budget {budget}: must be between 1 and {MAX_NODES} drafts")
    if batch_size < 1:
        raise SpiffyError(f"--batch-size {batch_size}: must be at least 1")
    if abs(seed) >= 1 << 53:
        raise SpiffyError(f"--seed {seed}: must be between -2^53 and 2^53")
    share = _share(shard)
    path = out or _default_path(model)
    check_writable(path)
    if report is not None:
        _check_report(report, path)
    from spiffy.calib.ranks import Ranks

    ranks = Ranks.from_environment()
    if workdir is None and (ranks.world > 1 or share != (0, 1)):
        raise SpiffyError("several ranks or --shard: give --workdir, which they share")

    with _resumable(workdir, ranks):
        with log.status("loading"):
            from spiffy.calib.prompts import load_prompts

            # Cheap to refuse, before torch is imported.
            prompts = load_prompts(dataset, samples, seed, skip_bad=skip_bad)

            from spiffy.calib.pipeline import build_graph, prepare, record
            from spiffy.calib.workdir import manifest_of
            from spiffy.runtime import decoding_settings, load_model
            from spiffy.runtime.generate import auto_profile

            switches = block_edges(edges)
            lm = load_model(model, device=ranks.device(device), dtype=dtype, device_map=device_map)
            settings = decoding_settings(
                lm,
                policy=policy,
                tokens_per_step=tokens_per_step,
                threshold=threshold,
                block_length=block_length,
                gen_length=gen_length,
                cache=cache,
                temperature=temperature,
            )
            tasks = prepare(lm, prompts, settings, seed, switches)
        note_skipped(prompts.skipped, dataset)
        if len(tasks) < len(prompts.texts):
            log.print(
                f"{len(prompts.texts) - len(tasks)} of {len(prompts.texts)} prompts cannot be "
                f"decoded and are left out: most likely too long for {settings.gen_length} more "
                "positions"
            )
        if workdir is None:
            with progress_bar() as bar:
                line = bar.add_task("decoding prompts", total=len(tasks))
                traces = record(
                    lm, tasks, batch_size, lambda done: bar.update(line, completed=done)
                )
        else:
            manifest = manifest_of(lm, prompts, settings, len(tasks), batch_size, seed, switches)
            kept = _record_in_workdir(workdir, manifest, lm, tasks, ranks, share)
            if kept is None:
                return
            traces = kept
        command = ("spiffy-calibrate", *sys.argv[1:])
        graph = build_graph(
            lm, prompts, settings, traces, budget, seed, objective, switches, command
        )
        with log.status("timing forwards"):
            tasks.sort(key=lambda task: len(task.prompt))
            task = replace(tasks[len(tasks) // 2], drafter=None, path=[])
            measured = auto_profile(task, graph) if graph.nodes else None
        if profile and measured is not None:
            graph = graph.model_copy(update={"cost_profiles": (measured,)})
        graph.save(path)
        _summarise(graph, traces)
        if measured is not None:
            _predict(graph, measured, task)
        log.print(f"wrote {path}", soft_wrap=True)
        if report is not None:
            _write_report(graph, measured, report)


@contextmanager
def _resumable(workdir: Path | None, ranks: Ranks) -> Iterator[None]:
    """Let only rank 0 talk, name the rank of an error, and say how to go on after Ctrl-C."""
    log.quiet = console.quiet = ranks.rank > 0
    try:
        yield
    except KeyboardInterrupt:
        if workdir is None:
            raise
        log.print(f"interrupted: the same command goes on from {workdir}", soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None
    except SpiffyError as error:
        named = ranks.world == 1 or str(error).startswith("rank ")
        raise error if named else SpiffyError(f"rank {ranks.rank}: {error}") from None
    finally:
        log.quiet = console.quiet = False


def _share(shard: str | None) -> tuple[int, int]:
    """Which of how many shards; (0, 1) is everything."""
    if shard is None:
        return 0, 1
    number, _, count = shard.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise SpiffyError(f"--shard {shard}: must be I/N with I from 0 to N - 1, such as 0/4")
    return int(number), int(count)


def _record_in_workdir(
    workdir: Path,
    manifest: Manifest,
    model: DiffusionLM,
    tasks: Sequence[Task],
    ranks: Ranks,
    share: tuple[int, int],
) -> Traces | None:
    """Record this rank's share of the shard; the traces, for the rank that has all of them."""
    from spiffy.calib.workdir import WorkDir

    ranks.join()
    try:
        if ranks.rank > 0:
            ranks.wait()  # rank 0 makes the directory
        with WorkDir(workdir, manifest, ranks.rank) as work:
            if ranks.rank == 0:
                ranks.wait()
            ranks.wait()  # nobody appends before all have seen what is there
            _record_into(work, model, tasks, ranks, share)
            ranks.wait()
        if ranks.rank > 0:
            return None
        if share != (0, 1):
            number, count = share
            log.print(
                f"recorded shard {number}/{count} in {workdir}; join with spiffy-calibrate merge",
                soft_wrap=True,
            )
            return None
        return work.traces()
    finally:
        ranks.leave()


def _record_into(
    work: WorkDir, model: DiffusionLM, tasks: Sequence[Task], ranks: Ranks, share: tuple[int, int]
) -> None:
    """Record what is missing of this shard and this rank, until done or interrupted."""
    from spiffy.calib.pipeline import groups
    from spiffy.calib.workdir import until_interrupted

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


@merge_app.command()
def merge(
    workdirs: Annotated[
        list[Path], typer.Argument(help="Work directories of the same model and settings.")
    ],
    out: Annotated[Path, typer.Option(help="Artifact to write.")],
    budget: BudgetOption = 32,
    objective: ObjectiveOption = "expected-steps",
) -> None:
    """Join work directories that were recorded apart, and grow one graph from all of them.

    Needs no model. Shards of one data set give what a single run would have given; of different
    prompts the order does not matter, and each is taken once.

    Example: spiffy-calibrate merge shard-0 shard-1 --out llada.json
    """
    if not 1 <= budget <= MAX_NODES:
        raise SpiffyError(f"--budget {budget}: must be between 1 and {MAX_NODES} drafts")
    check_writable(out)
    with log.status("joining"):
        from spiffy.calib.pipeline import build_from_facts
        from spiffy.calib.workdir import join
        from spiffy.runtime.cache import BlockEdges

        joined = join(workdirs)
        manifest = joined.manifest
        graph = build_from_facts(
            manifest.model,
            joined.origin,
            manifest.decoding,
            joined.traces,
            budget,
            manifest.seed,
            objective,
            BlockEdges(**manifest.edges),
            # Without the directories: how the prompts were split decides nothing.
            ("spiffy-calibrate", "merge", "--budget", str(budget), "--objective", objective),
        )
    if joined.repeated:
        log.print(f"{joined.repeated} prompts were there more than once and are counted once")
    graph.save(out)
    _summarise(graph, joined.traces)
    log.print(f"wrote {out}", soft_wrap=True)


def _check_report(report: Path, artifact: Path) -> None:
    """Fail before hours of work, not after."""
    from spiffy.bench.report import require_matplotlib

    require_matplotlib()
    check_writable(report)
    if report.resolve() == artifact.resolve():
        raise SpiffyError(f"--report {report}: would replace the artifact, give another name")


def _write_report(graph: DraftGraph, measured: CostProfile | None, report: Path) -> None:
    from spiffy.bench.report import write_calibration_report

    shown = {} if measured is None else {"cost_profiles": (measured,)}
    write_calibration_report(graph.model_copy(update=shown), report)
    log.print(f"wrote {report}", soft_wrap=True)


def _default_path(model: str) -> Path:
    if Path(model).is_dir():
        return Path(model) / "draft_graph.json"
    return Path(model.rsplit("/", 1)[-1].lower() + ".json")


def _summarise(graph: DraftGraph, traces: Traces) -> None:
    from spiffy.calib.pipeline import chain_counts, grow_by, steps_per_forward

    record, settings = graph.calibration, graph.decoding
    rival: Objective = "paper" if record.objective == "expected-steps" else "expected-steps"
    counts = chain_counts(traces)
    measured = traces.held_out or traces.growing
    other: list[float] = []
    if rival == "expected-steps" or len(counts) <= _MOST_COMPARED:
        rivals = grow_by(rival, counts, graph.budget)
        other = steps_per_forward((trace.chains for trace in measured), rivals)
    on = "held-out prompts" if traces.held_out else "prompt that the graph also grew on"
    table = Table(
        title=f"Denoising steps per forward on {len(measured)} {on} "
        f"({settings.policy}, cache {settings.cache}, block {settings.block_length})"
    )
    table.add_column("drafts", justify="right")
    points = () if graph.acceptance is None else graph.acceptance.expected_steps
    chosen = {point.drafts: point.steps for point in points}
    if chosen:
        table.add_column("chosen at run time", justify="right")
    table.add_column(f"this graph ({record.objective})", justify="right")
    if other:
        table.add_column(f"{rival} objective", justify="right")
    for drafts in sorted({*(b for b in _SHOWN_BUDGETS if b < graph.budget), graph.budget}):
        table.add_row(
            str(drafts),
            *([f"{chosen[drafts]:.2f}"] if chosen else []),
            f"{graph.expected_steps[drafts]:.2f}",
            *([f"{other[min(drafts, len(other) - 1)]:.2f}"] if other else []),
        )
    console.print(table)
    if not other:
        log.print(f"{rival} objective: left out, {len(counts)} distinct chains are too many for it")
    note_if_inexact(settings)
    log.print(
        f"{graph.budget} nodes from {record.roots} roots of {record.samples} prompts, "
        f"{traces.nfe} forwards, {traces.positions_computed} positions"
    )


def _predict(graph: DraftGraph, measured: CostProfile, task: Task) -> None:
    """Print how many drafts pay, here and on named accelerators, and what they should bring."""
    from spiffy.runtime.auto import best_plan, expected_steps
    from spiffy.runtime.roofline import ACCELERATORS, predicted_profile

    budgets = [point.drafts for point in measured.points]
    profiles = {f"this machine ({measured.dtype})": ("measured", measured)}
    for accelerator in ACCELERATORS:
        predicted = predicted_profile(
            task.model, accelerator, task.canvas, task.settings.cache, budgets, measured.drafting
        )
        profiles[f"{accelerator.name} (bfloat16)"] = ("roofline", predicted)
    table = Table(title="Predicted speedup over plain decoding")
    for heading in ("device", "forward times"):
        table.add_column(heading)
    for heading in ("plain forward", "drafts", "chosen by", "speedup"):
        table.add_column(heading, justify="right")
    for device, (source, profile) in profiles.items():
        plan = best_plan(expected_steps(graph), profile)
        table.add_row(
            device,
            source,
            f"{1000 * profile.points[0].seconds:.3g} ms",
            str(plan.drafts),
            plan.selection or "-",
            f"{plan.speedup:.2f}x",
        )
    console.print(table)
    log.print(
        "predictions: held-out steps per forward, over seconds of forward and drafting. Roofline: "
        "bandwidth and peak of the data sheet, without kernel launches (which decide on models of "
        "millions of parameters), drafting as timed on this machine",
        soft_wrap=True,
    )


def main() -> None:
    """Entry point of `spiffy-calibrate` and `spiffy-calibrate merge`.

    Not a group of commands: `spiffy-calibrate --model ...` has to stay as it is.
    """
    if sys.argv[1:2] == ["merge"]:
        run_app(lambda: merge_app(sys.argv[2:], prog_name="spiffy-calibrate merge"))
    else:
        run_app(app)


if __name__ == "__main__":
    main()
