"""`spiffy-calibrate`: from a model and prompts to a draft graph."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spiffy.calib.folder import check_no_record
from spiffy.calib.ranks import Ranks
from spiffy.cli.calibration_runs import (
    Recording,
    fitting,
    measured,
    note_left_out,
    recorded,
    timed,
)
from spiffy.cli.calibration_tables import predict, shape_like, summarise
from spiffy.cli.common import (
    compile_search,
    doing,
    log,
    note_fewer,
    resumable,
    run_app,
)
from spiffy.cli.options import (
    Adapter,
    Compile,
    Dataset,
    Decoding,
    Device,
    Dtype,
    Encoding,
    Field,
    Growth,
    Prepack,
    Quantize,
    Revision,
    SkipBad,
    Threads,
    VersionOption,
    model_option,
    note_toys,
    output_option,
    prompt_option,
    spread,
    tell_of_bfloat16,
)
from spiffy.cli.threads import read_threads, set_threads
from spiffy.schemas import SpiffyError
from spiffy.schemas.io import check_writable

if TYPE_CHECKING:
    from spiffy.calib.prompts import PromptSet
    from spiffy.runtime.models.base import DiffusionLM
    from spiffy.schemas import CostProfile, DraftGraph

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
merge_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def _list_models(wanted: bool) -> None:
    if not wanted:
        return
    from spiffy.runtime.models.published import PUBLISHED

    width = max(len(alias) for group in PUBLISHED for alias in group.places)
    for group in PUBLISHED:
        typer.echo(f"{group.title} (block length {group.blocks}; policy {group.policy})")
        for alias, place in group.places.items():
            shown = place if place.count("/") == 1 else "ships with the package"
            typer.echo(f"  {alias:{width}} {shown}")
    raise typer.Exit


@dataclass(frozen=True)
class _Model:
    """The model to calibrate for."""

    model: Annotated[
        str, model_option(help="Alias (tiny-llada, llada-8b, ...), hub id, or checkpoint folder.")
    ]
    revision: Revision = None
    device: Device = "auto"
    dtype: Dtype = "auto"
    adapter: Adapter = None
    quantize: Quantize = None
    compile: Compile = False
    prepack: Prepack = None
    threads: Threads = "auto"
    device_map: Annotated[
        str | None,
        model_option(
            help="auto, balanced, ...: spread a model over devices (needs accelerate). To decode "
            "with such a model use Python or Ray."
        ),
    ] = None
    list_models: Annotated[
        bool,
        model_option(
            "--list-models",
            callback=_list_models,
            is_eager=True,
            help="Print the aliases and exit.",
        ),
    ] = False

    def load(self, ranks: Ranks) -> DiffusionLM:
        """Load it, on this rank's device if there are several."""
        from spiffy.runtime import load_model

        model = load_model(
            self.model,
            revision=self.revision,
            device=ranks.device(self.device),
            dtype=self.dtype,
            device_map=self.device_map,
            adapter=self.adapter,
            quantize=self.quantize,
            compile=self.compile,
            prepack="auto" if self.prepack is None else self.prepack,
        )
        tell_of_bfloat16(model, self.dtype)
        return model


@dataclass(frozen=True)
class _Prompts:
    """The prompts to calibrate on."""

    dataset: Dataset = "synthetic"
    samples: Annotated[
        int,
        prompt_option(help="Prompts to decode; every fifth is held out to measure the graph."),
    ] = 50
    skip_bad: SkipBad = False
    field: Field = None

    def draw(self, seed: int) -> PromptSet:
        """Draw them."""
        from spiffy.calib.prompts import load_prompts

        found = load_prompts(
            self.dataset, self.samples, seed, skip_bad=self.skip_bad, field=self.field
        )
        note_fewer(found, self.samples)
        return found


@dataclass(frozen=True)
class _Output:
    """What is written."""

    out: Annotated[
        Path | None,
        output_option(
            help="Artifact to write. Default: draft_graph.json in a local checkpoint folder, else "
            "<alias>.json."
        ),
    ] = None
    report: Annotated[
        Path | None,
        output_option(help='Also write an HTML page about the artifact (extra "report").'),
    ] = None
    profile: Annotated[
        bool,
        output_option(
            "--profile",
            help="Store this machine's forward times in the artifact (not part of its digest).",
        ),
    ] = False

    predict_for: Annotated[
        str | None,
        output_option(
            help="Also predict what a model of this real shape would gain on accelerators if it "
            "accepted drafts like this one: qwen3-0.6b, sdar-8b, llada-8b, dream-7b, "
            "llada2-mini, ..."
        ),
    ] = None

    def path_for(self, model: str, writes: bool) -> Path:
        """Where the artifact goes; fails before hours of work where nothing can be written.

        A shard `writes` none.
        """
        path = self.out or _beside(model)
        options = (
            (self.report, "report"),
            (self.profile, "profile"),
            (self.predict_for, "predict-for"),
        )
        if given := [name for value, name in options if value and not writes]:
            raise SpiffyError(
                f"--shard: --{given[0]} is about an artifact, and a shard writes none: leave it out"
            )
        if writes or self.out is not None:
            check_writable(path)
        if writes:
            _note_replaced(path)
        if self.report is not None:
            _check_report(self.report, path)
        if self.predict_for is not None:
            shape_like(self.predict_for)
        return path

    def write(self, graph: DraftGraph, measured: CostProfile | None, path: Path) -> None:
        """Write the artifact."""
        if self.profile and measured is not None:
            graph = graph.model_copy(update={"cost_profiles": (measured,)})
        graph.save(path)

    def write_report(self, graph: DraftGraph, measured: CostProfile | None) -> None:
        """Write the page about the artifact, if one is wanted."""
        if self.report is None:
            return
        from spiffy.bench.report import write_calibration_report

        shown = {} if measured is None else {"cost_profiles": (measured,)}
        write_calibration_report(graph.model_copy(update=shown), self.report)
        log.print(f"wrote {self.report}", soft_wrap=True)


@app.command()
@spread
def calibrate(
    model: _Model,
    prompts: _Prompts,
    encoding: Encoding,
    decoding: Decoding,
    growth: Growth,
    recording: Recording,
    output: _Output,
    version: VersionOption = False,
) -> None:
    """Calibrate a draft graph: record which future states come true, keep those worth drafting.

    Decodes prompts plainly, records for every state which future states it led to, grows the graph
    that would have saved most forwards, and measures it on held-out prompts.

    Example: spiffy-calibrate --model tiny-llada --budget 32 --out llada.json

    Work directories (--workdir) recorded apart are joined by spiffy-calibrate merge (see its
    --help).
    """
    growth.check()
    encoding.check()
    decoding.check()
    threads = read_threads(model.threads)
    if abs(decoding.seed) >= 1 << 53:
        raise SpiffyError(f"--seed {decoding.seed}: must be between -2^53 and 2^53")
    ranks = Ranks.from_environment()
    recording.check(ranks)
    with resumable(recording.workdir, ranks):
        path = output.path_for(model.model, writes=recording.share() == (0, 1))
        with doing("loading"):
            drawn = prompts.draw(decoding.seed)  # cheap to refuse, before torch is imported
            drawn = replace(drawn, raw=encoding.raw, system=encoding.system)
            edges = decoding.block_edges()
            from spiffy.calib.pipeline import build_graph, prepare

            lm = model.load(ranks)
            settings = decoding.settings(lm)
            set_threads(lm, settings, threads)
            left_out: list[str] = []
            repeated: list[str] = []
            tasks = prepare(lm, drawn, settings, decoding.seed, edges, left_out, repeated)
        encoding.note_spelled(lm, drawn.texts)
        note_toys(prompts.dataset, lm)
        note_left_out(drawn, left_out, repeated)
        traces = recorded(recording, lm, drawn, tasks, ranks)
        if traces is None:
            return
        tasks = [task for task in tasks if task.sequence not in traces.failed]
        with doing("fitting") as status:
            compile_search(status)
        command = ("spiffy-calibrate", *sys.argv[1:])
        with fitting() as on_replay:
            graph = build_graph(
                lm,
                drawn,
                settings,
                traces,
                growth.budget,
                decoding.seed,
                growth.objective,
                edges,
                command,
                on_replay,
            )
        output.write(graph, None, path)  # hours of decoding must not hang on what comes now
        log.print(f"wrote {path}, to be written again with what is measured now", soft_wrap=True)
        try:
            graph = measured(graph, tasks, traces)
        except SpiffyError as problem:  # no bad input: that was decoded once
            log.print(
                f"error: {problem}; {path} holds the whole graph, without measured steps",
                soft_wrap=True,
            )
            raise typer.Exit(1) from None
        task, costs = timed(tasks, graph)
        output.write(graph, costs, path)
        summarise(graph, traces)
        if costs is not None:
            predict(graph, costs, task, output.predict_for)
        log.print(f"wrote {path}", soft_wrap=True)
        output.write_report(graph, costs)


def _beside(model: str) -> Path:
    """Where the artifact goes by default: into the model's folder, if it is one, else here."""
    from spiffy.runtime.models import ALIASES

    if Path(model).is_dir() and model not in ALIASES:
        return Path(model) / "draft_graph.json"
    return Path(f"{model.rsplit('/', 1)[-1].lower()}.json")


def _note_replaced(path: Path) -> None:
    """Say that a file will be replaced; not if traces of hours would be lost with it."""
    check_no_record(path)
    if path.exists():
        log.print(f"{path} is there already, and will be replaced", soft_wrap=True)


def _check_report(report: Path, artifact: Path) -> None:
    """Fail before hours of work, not after."""
    from spiffy.bench.report import require_matplotlib

    require_matplotlib()
    check_writable(report)
    check_no_record(report)
    if report.resolve() == artifact.resolve():
        raise SpiffyError(f"--report {report}: would replace the artifact, give another name")


@merge_app.command()
@spread
def merge(
    workdirs: Annotated[
        list[Path], typer.Argument(help="Work directories of the same model and settings.")
    ],
    out: Annotated[Path, output_option(help="Artifact to write.")],
    growth: Growth,
) -> None:
    """Join work directories that were recorded apart, and grow one graph from all of them.

    Needs no model. Shards of one data set give what a single run would have given; of different
    prompts the order does not matter, and each is taken once.

    Example: spiffy-calibrate merge shard-0 shard-1 --out llada.json
    """
    growth.check()
    check_writable(out)
    _note_replaced(out)
    budget, objective = growth.budget, growth.objective
    with doing("joining"):
        from spiffy.calib.pipeline import build_from_facts
        from spiffy.calib.workdir import join
        from spiffy.runtime import BlockEdges

        joined = join(workdirs)
        manifest = joined.manifest
    if joined.repeated:
        log.print(f"{joined.repeated} prompts were there more than once and are counted once")
    if joined.failed:
        log.print(f"{joined.failed} prompts failed when they were decoded, and are left out")
    with fitting() as on_replay:
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
            on_replay,
        )
    graph.save(out)
    summarise(graph, joined.traces)
    log.print(f"wrote {out}", soft_wrap=True)


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
