"""`spiffy-bench`: every way of drafting side by side, in one run, on prompts not calibrated on."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.status import Status

from spiffy.cli.common import (
    console,
    decodable,
    log,
    note_if_inexact,
    note_skipped,
    progress_bar,
    ready_to_draft,
    run_app,
    warn_of_differences,
)
from spiffy.cli.options import (
    Dataset,
    Decoding,
    Encoding,
    Field,
    ModelOfGraph,
    SkipBad,
    VersionOption,
    drafting_option,
    draw,
    model_option,
    output_option,
    prompt_option,
    spread,
)
from spiffy.cli.streams import write
from spiffy.cli.threads import read_threads, set_threads
from spiffy.schemas import DraftGraph, SpiffyError
from spiffy.schemas.bench import Bench, DataRecord
from spiffy.schemas.errors import printable
from spiffy.schemas.io import check_writable, write_atomically

if TYPE_CHECKING:
    from torch import Tensor

    from spiffy.bench.measure import Measurements
    from spiffy.bench.methods import Method
    from spiffy.calib.prompt_files import Text
    from spiffy.calib.prompts import PromptSet
    from spiffy.runtime import BlockEdges
    from spiffy.runtime.models import DiffusionLM
    from spiffy.schemas import CostProfile, DecodingSettings
    from spiffy.schemas.bench import Machine, MethodKind

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_KINDS = "plain, freedave, chain, paper, pruned, graph, model, order, auto, perfect"


def _compare(files: tuple[Path, Path] | None) -> None:
    if files is None:
        return
    from spiffy.bench.compare import compare

    write(compare(Bench.load(files[0]), Bench.load(files[1])) + "\n")
    raise typer.Exit


@dataclass(frozen=True)
class _Shape:
    """A real size without real weights."""

    shape: Annotated[
        str | None,
        model_option(
            help="Grow the model into a real one's shape, such as qwen3-0.6b: same tokens, and "
            "forwards that cost what that model's cost."
        ),
    ] = None

    def check(self) -> None:
        """Refuse an unknown shape before anything is loaded."""
        from spiffy.bench.grow import shape_named

        if self.shape is not None:
            shape_named(self.shape)

    def grown(
        self, options: ModelOfGraph, model: DiffusionLM, graphs: Sequence[DraftGraph | None]
    ) -> tuple[DiffusionLM, list[DraftGraph | None]]:
        """Model and graphs, grown if that is asked for."""
        from spiffy.bench.grow import grow, grow_graph
        from spiffy.runtime.models.compiled import compile_transformer
        from spiffy.runtime.models.prepack import prepack, prepack_if_faster

        if self.shape is None:
            return model, [*graphs]
        large = grow(model, self.shape)
        if options.prepack is None:
            prepack_if_faster(large)
        elif options.prepack:
            prepack(large)
        if model.compiled is not None:
            compile_transformer(large)
        return large, [
            None if graph is None else grow_graph(graph, model, large, options.any_model)
            for graph in graphs
        ]


@dataclass(frozen=True)
class _Prompts:
    """The prompts to measure on."""

    dataset: Dataset = "synthetic"
    samples: Annotated[int, prompt_option(help="Prompts to decode.")] = 12
    skip_bad: SkipBad = False
    field: Field = None
    allow_calibrated: Annotated[
        bool,
        prompt_option(
            "--allow-calibrated", help="Accept prompts that the graph was calibrated on; says so."
        ),
    ] = False

    def draw(self, seed: int) -> PromptSet:
        """Draw them."""
        found = draw(
            self.dataset,
            self.samples,
            seed,
            test=True,
            skip_bad=self.skip_bad,
            field=self.field,
        )
        note_skipped(found.skipped, found.dataset)
        return found

    def known(self, texts: Sequence[Text], artifact: DraftGraph) -> int:
        """How many of them the graph was calibrated on; refused unless allowed."""
        from spiffy.bench.measure import overlap
        from spiffy.calib.prompts import prompt_digest

        known = overlap(map(prompt_digest, texts), artifact.calibration.prompt_digests or ())
        if known and not self.allow_calibrated:
            raise SpiffyError(
                f"{self.dataset}: the graph was calibrated on {known} of these {len(texts)} "
                "prompts, which would flatter it: take others (--seed, --dataset), or "
                "--allow-calibrated"
            )
        return known


@dataclass(frozen=True)
class _Methods:
    """What is measured, and how often."""

    paper: Annotated[
        str | None,
        drafting_option(
            help="Graph by the paper's rule (spiffy-calibrate --objective paper), to compare with."
        ),
    ] = None
    order: Annotated[
        Path | None,
        drafting_option(
            help="Order network (studies/rival.py --save), our reading of SPOT, to compare with."
        ),
    ] = None
    methods: Annotated[
        str,
        drafting_option(help=f"all, or a list of: {_KINDS}. Plain decoding is always there."),
    ] = "all"
    budgets: Annotated[
        str | None,
        drafting_option(
            help="Drafts per forward, a list. Default: 1,2,4,8,16,32 as far as it goes."
        ),
    ] = None
    repeats: Annotated[
        int, drafting_option(help="Counted decodes of each prompt by each method.")
    ] = 3
    warm_up: Annotated[int, drafting_option(help="Decodes of each method, not counted.")] = 1
    execute_code: Annotated[
        bool,
        drafting_option(
            "--execute-code",
            help="Score HumanEval by running what the model wrote, in a limited process.",
        ),
    ] = False

    def check(self, artifact: DraftGraph) -> None:
        """Refuse what cannot be measured, before anything is loaded."""
        self.kinds()
        self.numbers(artifact)
        for name, value, least in (("--repeats", self.repeats, 1), ("--warm-up", self.warm_up, 0)):
            if value < least:
                raise SpiffyError(f"{name} {value}: must be at least {least}")

    def kinds(self) -> list[MethodKind]:
        """Kinds of methods asked for."""
        from spiffy.bench.methods import KINDS

        if self.methods == "all":
            return list(KINDS)
        found: list[MethodKind] = []
        for word in map(str.strip, self.methods.split(",")):
            kind = next((kind for kind in KINDS if kind == word), None)
            if kind is None:
                raise SpiffyError(
                    f"--methods {self.methods!r}: {word!r} is none; give all, or of {_KINDS}"
                )
            found.append(kind)
        return found

    def numbers(self, artifact: DraftGraph) -> list[int]:
        """Budgets asked for, ascending."""
        if not artifact.budget:
            raise SpiffyError("the graph holds no drafts: calibrate on more prompts")
        if self.budgets is None:
            return [n for n in (1, 2, 4, 8, 16, 32) if n <= artifact.budget]
        found = []
        for word in map(str.strip, self.budgets.split(",")):
            if not word.isdecimal() or not 1 <= int(word) <= artifact.budget:
                raise SpiffyError(
                    f"--budgets {self.budgets!r}: {word!r} is no number from 1 to "
                    f"{artifact.budget}, the graph's drafts"
                )
            found.append(int(word))
        return sorted(set(found))


_FILES = ("bench.json", "rows.jsonl", "table.md", "report.html")


@dataclass(frozen=True)
class _Output:
    """Where the results go."""

    out: Annotated[
        Path,
        output_option(
            help="Folder to write, made if missing: bench.json, table.md, rows.jsonl and, with the "
            'extra "report", report.html.'
        ),
    ]
    compare: Annotated[
        tuple[Path, Path] | None,
        output_option(
            callback=_compare,
            is_eager=True,
            metavar="A.json B.json",
            help="Compare two runs (their bench.json) instead of measuring.",
        ),
    ] = None

    def make_folder(self) -> None:
        """Make it, before hours of work."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SpiffyError(
                f"--out {self.out}: cannot be written to ({error.strerror})"
            ) from None
        for name in _FILES:
            check_writable(self.out / name)


@dataclass(frozen=True)
class _Run:
    """What is measured, on what."""

    lm: DiffusionLM
    artifact: DraftGraph
    settings: DecodingSettings
    edges: BlockEdges
    methods: Sequence[Method]
    texts: Sequence[Text]
    prompts: Sequence[Tensor]
    records: Sequence[Any]
    data: DataRecord


@app.command()
@spread
def bench(
    graph: Annotated[
        str,
        model_option(
            help="Draft graph, as written by spiffy-calibrate: a file, a folder or a hub id "
            "(owner/name) that has draft_graph.json."
        ),
    ],
    model: ModelOfGraph,
    shape: _Shape,
    prompts: _Prompts,
    encoding: Encoding,
    decoding: Decoding,
    methods: _Methods,
    output: _Output,
    version: VersionOption = False,
) -> None:
    """Measure every way of drafting against plain decoding: same prompts, same run.

    Methods take turns prompt by prompt, so that the machine's drift hits all alike. Every answer is
    compared with plain decoding's, token for token; exit code 1 if one differs that must not.

    Example: spiffy-bench --graph llada.json --samples 12 --out out/llada
    """
    artifact = DraftGraph.find(graph)
    methods.check(artifact)
    encoding.check()
    shape.check()
    output.make_folder()
    with log.status("loading") as status:
        from spiffy.bench.measure import load_average, machine

        load = load_average()
        run = _prepared(artifact, graph, model, shape, prompts, encoding, decoding, methods, status)
    found = _measured(run, methods, decoding.seed)
    with log.status("summing up"):
        summary = _summary(run, found, machine(run.lm, load))
        written = _write(output.out, summary, [asdict(row) for row in found.rows])
    note_if_inexact(run.settings)
    _print_table(summary)
    log.print(f"wrote {', '.join(str(path) for path in written)}", soft_wrap=True)
    if run.settings.exact and any(result.differing for result in summary.results):
        raise typer.Exit(1)


def _prepared(
    artifact: DraftGraph,
    place: str,
    model: ModelOfGraph,
    shape: _Shape,
    prompts: _Prompts,
    encoding: Encoding,
    decoding: Decoding,
    methods: _Methods,
    status: Status,
) -> _Run:
    """Load the model, draw the prompts, set up the methods."""
    from spiffy.bench.methods import methods as methods_of
    from spiffy.bench.order import load_order

    threads = read_threads(model.threads)
    drawn = prompts.draw(decoding.seed)
    rival = None if methods.paper is None else DraftGraph.find(methods.paper)
    network = None if methods.order is None else load_order(methods.order)
    asked = model if shape.shape is None else replace(model, prepack=False)  # grown, then prepacked
    lm = asked.load(artifact, place)
    lm, (ours, rival) = shape.grown(model, lm, (artifact, rival))
    artifact = ours or artifact
    settings, edges = decoding.settings(lm, artifact, model.any_model), decoding.block_edges()
    set_threads(lm, settings, threads)
    warn_of_differences(artifact, settings)
    chosen = decodable(lm, settings, drawn.texts, raw=encoding.raw, system=encoding.system)
    encoding.note_spelled(lm, drawn.texts)
    texts, ids = [drawn.texts[index] for index, _ in chosen], [ids for _, ids in chosen]
    known = prompts.known(texts, artifact)
    ready_to_draft(artifact, status)
    if methods.execute_code:
        log.print("--execute-code runs what the model writes, in a process with limits")
    kinds, numbers = methods.kinds(), methods.numbers(artifact)
    found = methods_of(
        lm, settings, artifact, kinds, numbers, rival, ids, edges, model.any_model, network
    )
    return _Run(
        lm=lm,
        artifact=artifact,
        settings=settings,
        edges=edges,
        methods=found,
        texts=texts,
        prompts=ids,
        records=[drawn.records[index] for index, _ in chosen],
        data=DataRecord(
            dataset=drawn.dataset,
            sha256=drawn.sha256,
            samples=len(texts),
            left_out=len(drawn.texts) - len(texts),
            seed=decoding.seed,
            calibrated_on=known,
            warm_up=methods.warm_up,
            repeats=methods.repeats,
        ),
    )


def _measured(run: _Run, methods: _Methods, seed: int) -> Measurements:
    """Decode, with a progress bar."""
    from spiffy.bench.measure import measure

    prompts, rivals = len(run.prompts), run.methods[1:]
    total = prompts + len(run.methods) * methods.repeats * prompts + methods.warm_up * len(rivals)
    with progress_bar() as bar:
        line = bar.add_task(f"decoding by {len(run.methods)} methods", total=total)
        return measure(
            run.lm,
            run.methods,
            run.prompts,
            run.records,
            methods.repeats,
            methods.warm_up,
            seed,
            run.edges,
            methods.execute_code,
            lambda: bar.advance(line),
        )


def _summary(run: _Run, found: Measurements, machine: Machine) -> Bench:
    """What is kept of a run."""
    from spiffy.bench.measure import results, walkthrough
    from spiffy.calib.prompt_files import question

    artifact, edges = run.artifact, run.edges
    shown = _to_step_through(run.methods)
    return Bench(
        command=shlex.join([Path(sys.argv[0]).name, *map(printable, sys.argv[1:])]),
        machine=machine,
        model=artifact.model,
        decoding=run.settings,
        edges=tuple(f.name for f in fields(edges) if getattr(edges, f.name)),
        graph_digest=artifact.digest(),
        nodes=artifact.nodes,
        roots=artifact.calibration.roots,
        data=run.data,
        baseline=run.methods[0].name,
        results=results(run.methods, found),
        profile=_profile(run),
        walkthrough=walkthrough(run.lm, shown, run.methods[0], [*map(question, run.texts)], found),
    )


def _to_step_through(methods: Sequence[Method]) -> Method:
    """Of those that draft, the best chosen with up to 8 drafts: more cannot be looked at."""
    order = ["model", "graph", "pruned", "paper", "order", "chain", "freedave", "perfect", "auto"]
    small = [method for method in methods if method.budget is None or method.budget <= 8]
    return min(small, key=lambda m: ([*order, "plain"].index(m.kind), -(m.budget or 0)))


def _profile(run: _Run) -> CostProfile | None:
    """What a forward costs here; known already if "auto" was measured."""
    from spiffy.bench.methods import median_task
    from spiffy.runtime.budget.auto import auto_profile

    if run.artifact.differences(run.settings):
        return None
    task = median_task(run.lm, run.settings, run.prompts, run.edges)
    return auto_profile(task, run.artifact)


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
        write(markdown(summary) + "\n")


def main() -> None:
    """Entry point of `spiffy-bench`."""
    run_app(app)


if __name__ == "__main__":
    main()
