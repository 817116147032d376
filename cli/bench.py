"""`spiffy-bench`: every way of drafting side by side, in one run, on prompts not calibrated on."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spiffy.cli.common import (
    VERSION_OPTION,
    DeviceOption,
    DtypeOption,
    EdgesOption,
    block_edges,
    console,
    decodable,
    log,
    model_of,
    note_if_inexact,
    progress_bar,
    run_app,
    warn_of_differences,
)
from spiffy.schemas import DraftGraph, SpiffyError
from spiffy.schemas.bench import Bench, DataRecord
from spiffy.schemas.io import write_atomically

if TYPE_CHECKING:
    from spiffy.bench.methods import Method
    from spiffy.runtime.models import DiffusionLM
    from spiffy.schemas import DecodingSettings
    from spiffy.schemas.bench import MethodKind

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_KINDS = "plain, chain, paper, pruned, graph, model, auto, perfect"


def _compare(files: tuple[Path, Path] | None) -> None:
    if files is None:
        return
    from spiffy.bench.compare import compare

    typer.echo(compare(Bench.load(files[0]), Bench.load(files[1])))
    raise typer.Exit


@app.command()
def bench(
    graph: Annotated[Path, typer.Option(help="Draft graph, as written by spiffy-calibrate.")],
    out: Annotated[
        Path,
        typer.Option(
            help="Folder to write, made if missing: bench.json, table.md, rows.jsonl and, with the "
            'extra "report", report.html.'
        ),
    ],
    model: Annotated[
        str | None, typer.Option(help="Alias, hub id or folder. Default: the graph's model.")
    ] = None,
    paper: Annotated[
        Path | None,
        typer.Option(
            help="Graph by the paper's rule (spiffy-calibrate --objective paper), to compare with."
        ),
    ] = None,
    dataset: Annotated[
        str,
        typer.Option(
            help="synthetic, gsm8k, humaneval, mbpp, math500, or a JSONL file with a 'prompt' or "
            "'question' field."
        ),
    ] = "synthetic",
    samples: Annotated[int, typer.Option(help="Prompts to decode.")] = 12,
    methods: Annotated[
        str, typer.Option(help=f"all, or a list of: {_KINDS}. Plain decoding is always there.")
    ] = "all",
    budgets: Annotated[
        str | None,
        typer.Option(help="Drafts per forward, a list. Default: 1,2,4,8,16,32 as far as it goes."),
    ] = None,
    repeats: Annotated[
        int, typer.Option(help="Counted decodes of each prompt by each method.")
    ] = 3,
    warm_up: Annotated[int, typer.Option(help="Decodes of each method, not counted.")] = 1,
    policy: Annotated[
        str | None, typer.Option(help="static, threshold or sequential. Default: the graph's.")
    ] = None,
    tokens_per_step: Annotated[int | None, typer.Option(help="Default: the graph's.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Default: the graph's.")] = None,
    block_length: Annotated[int | None, typer.Option(help="Default: the graph's.")] = None,
    gen_length: Annotated[int | None, typer.Option(help="Default: the graph's, else 256.")] = None,
    cache: Annotated[
        str | None, typer.Option(help="none, dual, prefix or block. Default: the graph's.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Default: the graph's.")] = None,
    seed: Annotated[int, typer.Option(help="Draws the prompts, and the noise if any.")] = 0,
    edges: EdgesOption = "all",
    execute_code: Annotated[
        bool,
        typer.Option(
            "--execute-code",
            help="Score HumanEval by running what the model wrote, in a limited process.",
        ),
    ] = False,
    allow_calibrated: Annotated[
        bool,
        typer.Option(
            "--allow-calibrated", help="Accept prompts that the graph was calibrated on; says so."
        ),
    ] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            callback=_compare,
            is_eager=True,
            metavar="A.json B.json",
            help="Compare two runs (their bench.json) instead of measuring.",
        ),
    ] = None,
    version: Annotated[bool, VERSION_OPTION] = False,
) -> None:
    """Measure every way of drafting against plain decoding: same prompts, same run.

    Methods take turns prompt by prompt, so that the machine's drift hits all alike. Every answer is
    compared with plain decoding's, token for token; exit code 1 if one differs that must not.

    Example: spiffy-bench --graph llada.json --samples 12 --out out/llada
    """
    artifact = DraftGraph.load(graph)
    rival = None if paper is None else DraftGraph.load(paper)
    kinds = _kinds(methods)
    numbers = _budgets(budgets, artifact)
    for name, value, least in (("--repeats", repeats, 1), ("--warm-up", warm_up, 0)):
        if value < least:
            raise SpiffyError(f"{name} {value}: must be at least {least}")
    _make_folder(out)

    with log.status("loading"):
        from spiffy.bench.measure import load_average, overlap
        from spiffy.bench.methods import methods as methods_of
        from spiffy.calib.prompts import load_prompts, prompt_digest
        from spiffy.runtime import decoding_settings, load_model

        load = load_average()
        switches = block_edges(edges)
        prompts = load_prompts(dataset, samples, seed, split="test")
        lm = (
            model_of(artifact, graph, device, dtype)
            if model is None
            else load_model(model, device=device, dtype=dtype)
        )
        settings = decoding_settings(
            lm,
            artifact,
            policy=policy,
            tokens_per_step=tokens_per_step,
            threshold=threshold,
            block_length=block_length,
            gen_length=gen_length,
            cache=cache,
            temperature=temperature,
        )
        warn_of_differences(artifact, settings)
        chosen = decodable(lm, settings, list(prompts.texts))
        texts = [text for _, text in chosen]
        known = overlap(map(prompt_digest, texts), artifact.calibration.prompt_digests or ())
        if known and not allow_calibrated:
            raise SpiffyError(
                f"{dataset}: the graph was calibrated on {known} of these {len(texts)} prompts, "
                "which would flatter it: take others (--seed, --dataset), or --allow-calibrated"
            )
        if execute_code:
            log.print("--execute-code runs what the model writes, in a process with limits")
        measured_by = methods_of(lm, settings, artifact, kinds, numbers, rival, texts, switches)

    from spiffy.bench.measure import machine, measure, results, walkthrough

    total = len(texts) + len(measured_by) * (repeats * len(texts)) + warm_up * len(measured_by[1:])
    with progress_bar() as bar:
        line = bar.add_task(f"decoding by {len(measured_by)} methods", total=total)
        found = measure(
            lm,
            measured_by,
            texts,
            [prompts.records[index] for index, _ in chosen],
            repeats,
            warm_up,
            seed,
            switches,
            execute_code,
            lambda: bar.advance(line),
        )
    with log.status("summing up"):
        shown = _to_step_through(measured_by)
        summary = Bench(
            command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            machine=machine(lm, load),
            model=artifact.model,
            decoding=settings,
            edges=tuple(f.name for f in fields(switches) if getattr(switches, f.name)),
            graph_digest=artifact.digest(),
            nodes=artifact.nodes,
            roots=artifact.calibration.roots,
            data=DataRecord(
                dataset=prompts.dataset,
                sha256=prompts.sha256,
                samples=len(texts),
                left_out=len(prompts.texts) - len(texts),
                seed=seed,
                calibrated_on=known,
                warm_up=warm_up,
                repeats=repeats,
            ),
            baseline=measured_by[0].name,
            results=results(measured_by, found),
            profile=_profile(lm, artifact, settings, texts, switches),
            walkthrough=walkthrough(lm, shown, measured_by[0], texts, found),
        )
        written = _write(out, summary, [asdict(row) for row in found.rows])
    note_if_inexact(settings)
    _print_table(summary)
    log.print(f"wrote {', '.join(str(path) for path in written)}", soft_wrap=True)
    if settings.exact and any(result.differing for result in summary.results):
        raise typer.Exit(1)


def _kinds(words: str) -> list[MethodKind]:
    from spiffy.bench.methods import KINDS

    if words == "all":
        return list(KINDS)
    found: list[MethodKind] = []
    for word in map(str.strip, words.split(",")):
        kind = next((kind for kind in KINDS if kind == word), None)
        if kind is None:
            raise SpiffyError(f"--methods {words!r}: {word!r} is none; give all, or of {_KINDS}")
        found.append(kind)
    return found


def _budgets(words: str | None, artifact: DraftGraph) -> list[int]:
    if not artifact.budget:
        raise SpiffyError("the graph holds no drafts: calibrate on more prompts")
    if words is None:
        return [n for n in (1, 2, 4, 8, 16, 32) if n <= artifact.budget]
    found = []
    for word in map(str.strip, words.split(",")):
        if not word.isdecimal() or not 1 <= int(word) <= artifact.budget:
            raise SpiffyError(
                f"--budgets {words!r}: {word!r} is no number from 1 to {artifact.budget}, the "
                "graph's drafts"
            )
        found.append(int(word))
    return sorted(set(found))


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise SpiffyError(f"--out {folder}: cannot be written to ({error.strerror})") from None


def _to_step_through(methods: Sequence[Method]) -> Method:
    """Of those that draft, the best chosen with up to 8 drafts: more cannot be looked at."""
    order = ("model", "graph", "pruned", "paper", "chain", "perfect", "auto", "plain")
    small = [method for method in methods if method.budget is None or method.budget <= 8]
    return min(small, key=lambda m: (order.index(m.kind), -(m.budget or 0)))


def _profile(
    lm: DiffusionLM,
    artifact: DraftGraph,
    settings: DecodingSettings,
    texts: Sequence[str],
    edges: Any,
) -> Any:
    """What a forward costs here; known already if "auto" was measured."""
    from spiffy.bench.methods import median_task
    from spiffy.runtime.generate import auto_profile

    if artifact.differences(settings):
        return None
    return auto_profile(median_task(lm, settings, texts, edges), artifact)


def _write(out: Path, summary: Bench, rows: Sequence[dict[str, Any]]) -> list[Path]:
    """Write all files of a run; returns those that people read."""
    from spiffy.bench.report import require_matplotlib, write_report
    from spiffy.bench.tables import markdown

    summary.save(out / "bench.json")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(out / "rows.jsonl", lines)
    write_atomically(out / "table.md", markdown(summary) + "\n")
    written = [out / "table.md"]
    try:
        require_matplotlib()
    except SpiffyError as missing:
        log.print(f"no report.html: {missing}", soft_wrap=True)
    else:
        write_report(summary, out / "report.html")
        written.append(out / "report.html")
    return written


def _print_table(summary: Bench) -> None:
    from spiffy.bench.tables import markdown, terminal_table

    if console.is_terminal:
        console.print(terminal_table(summary))
    else:
        typer.echo(markdown(summary))


def main() -> None:
    """Entry point of `spiffy-bench`."""
    run_app(app)


if __name__ == "__main__":
    main()
