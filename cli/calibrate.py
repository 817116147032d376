"""`spiffy-calibrate`: from a model and prompts to a draft graph."""

from __future__ import annotations

import sys
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
    from spiffy.runtime.decode import Task
    from spiffy.schemas import CostProfile, DraftGraph, Objective

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

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
    budget: Annotated[int, typer.Option(help="Drafts per forward that the graph may hold.")] = 32,
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
    objective: Annotated[
        Literal["expected-steps", "paper"],
        typer.Option(
            help="expected-steps (steps that drafts save), or paper (degree-1 accumulation, in the "
            "reading that did best)."
        ),
    ] = "expected-steps",
    batch_size: Annotated[int, typer.Option(help="Prompts decoded together.")] = 8,
    edges: EdgesOption = "all",
    skip_bad: SkipBadOption = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
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
    """
    if not 1 <= budget <= MAX_NODES:
        raise SpiffyError(f"--budget {budget}: must be between 1 and {MAX_NODES} drafts")
    if batch_size < 1:
        raise SpiffyError(f"--batch-size {batch_size}: must be at least 1")
    if abs(seed) >= 1 << 53:
        raise SpiffyError(f"--seed {seed}: must be between -2^53 and 2^53")
    path = out or _default_path(model)
    check_writable(path)
    if report is not None:
        _check_report(report, path)

    with log.status("loading"):
        from spiffy.calib.prompts import load_prompts

        prompts = load_prompts(
            dataset, samples, seed, skip_bad=skip_bad
        )  # cheap to refuse, before torch is imported

        from spiffy.calib.pipeline import build_graph, prepare, record
        from spiffy.runtime import decoding_settings, load_model
        from spiffy.runtime.generate import auto_profile

        switches = block_edges(edges)
        lm = load_model(model, device=device, dtype=dtype)
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
            f"{len(prompts.texts) - len(tasks)} of {len(prompts.texts)} prompts cannot be decoded "
            f"and are left out: most likely too long for {settings.gen_length} more positions"
        )
    with progress_bar() as bar:
        line = bar.add_task("decoding prompts", total=len(tasks))
        traces = record(lm, tasks, batch_size, lambda done: bar.update(line, completed=done))
    command = ("spiffy-calibrate", *sys.argv[1:])
    graph = build_graph(lm, prompts, settings, traces, budget, seed, objective, switches, command)
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
        from spiffy.bench.report import write_calibration_report

        shown = {} if measured is None else {"cost_profiles": (measured,)}
        write_calibration_report(graph.model_copy(update=shown), report)
        log.print(f"wrote {report}", soft_wrap=True)


def _check_report(report: Path, artifact: Path) -> None:
    """Fail before hours of work, not after."""
    from spiffy.bench.report import require_matplotlib

    require_matplotlib()
    check_writable(report)
    if report.resolve() == artifact.resolve():
        raise SpiffyError(f"--report {report}: would replace the artifact, give another name")


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
    other = steps_per_forward(
        [trace.chains for trace in measured], grow_by(rival, counts, graph.budget)
    )
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
    table.add_column(f"{rival} objective", justify="right")
    for drafts in sorted({*(b for b in _SHOWN_BUDGETS if b < graph.budget), graph.budget}):
        table.add_row(
            str(drafts),
            *([f"{chosen[drafts]:.2f}"] if chosen else []),
            f"{graph.expected_steps[drafts]:.2f}",
            f"{other[min(drafts, len(other) - 1)]:.2f}",
        )
    console.print(table)
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
    """Entry point of `spiffy-calibrate`."""
    run_app(app)


if __name__ == "__main__":
    main()
