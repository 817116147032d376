"""`spiffy-bench`: every way of drafting side by side, in one run, on prompts not calibrated on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spiffy.cli.bench_run import (
    FILES,
    ROWS_SO_FAR,
    Run,
    check_rival,
    costs_known,
    measured,
    print_table,
    profile_of,
    summed_up,
    write_files,
    write_rows,
)
from spiffy.cli.common import (
    INTERRUPTED,
    Doing,
    decodable,
    doing,
    log,
    note_fewer,
    note_if_inexact,
    note_of_ties,
    note_skipped,
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
from spiffy.schemas.io import check_writable

if TYPE_CHECKING:
    from spiffy.bench.methods import Method
    from spiffy.calib.prompt_files import Text
    from spiffy.calib.prompts import PromptSet
    from spiffy.runtime.models import DiffusionLM
    from spiffy.schemas.bench import MethodKind

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
        from spiffy.calib.prompts import load_prompts

        found = load_prompts(
            self.dataset,
            self.samples,
            seed,
            split="test",
            skip_bad=self.skip_bad,
            field=self.field,
        )
        note_skipped(found.skipped, found.dataset)
        note_fewer(found, self.samples)
        return found

    def note_toys(self, artifact: DraftGraph) -> None:
        """Say that these are other problems than the graph was calibrated on, if nobody chose."""
        calibrated_on = artifact.calibration.dataset
        if self.dataset == "synthetic" and calibrated_on != "synthetic":
            log.print(
                "the prompts are generated word problems, and the graph was calibrated on "
                f"{printable(calibrated_on)}: give --dataset to measure on prompts of that kind",
                soft_wrap=True,
            )

    def known(
        self, texts: Sequence[Text], artifact: DraftGraph, what: str = "the graph"
    ) -> int | None:
        """How many of them the graph was calibrated on, if it says so; refused unless allowed."""
        from spiffy.bench.measure import overlap
        from spiffy.calib.prompts import prompt_digest

        known = overlap(map(prompt_digest, texts), artifact.calibration.prompt_digests)
        if known and not self.allow_calibrated:
            raise SpiffyError(
                f"{self.dataset}: {what} was calibrated on {known} of these {len(texts)} "
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
    warm_up: Annotated[
        int, drafting_option(help="Decodes of the first prompt by each method, not counted.")
    ] = 1
    execute_code: Annotated[
        bool,
        drafting_option(
            "--execute-code",
            help="Score HumanEval by running what the model wrote, in a limited process.",
        ),
    ] = False

    def check(self, artifact: DraftGraph) -> None:
        """Refuse what cannot be measured, before anything is loaded."""
        kinds = self.kinds()
        self.numbers(artifact)
        for option, given, users in (
            ("--paper", self.paper, ("paper", "pruned")),
            ("--order", self.order, ("order",)),
        ):
            asked = [kind for kind in users if kind in kinds]
            if given is None and asked and self.methods != "all":
                raise SpiffyError(f"--methods {self.methods!r}: {asked[0]} needs {option} FILE")
            if given is not None and not asked:
                needed = " or ".join(users)
                raise SpiffyError(f"{option} {given}: --methods has no {needed}, which it is for")
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
                    f"--methods {self.methods}: no method {word!r}; give all, or some of {_KINDS}"
                )
            found.append(kind)
        return found

    def check_all_there(self, found: Sequence[Method], cache: str) -> None:
        """Refuse to leave out, unsaid, what was asked for by name."""
        why = {
            "freedave": f"with the cache {cache} and these --edges it is what chain is",
            "paper": "the graph of --paper has fewer nodes than --budgets",
            "model": "the graph has no acceptance model: calibrate again",
            "pruned": "the graph of --paper has no more nodes than --budgets",
        }
        for kind in self.kinds() if self.methods != "all" else ():
            if all(method.kind != kind for method in found):
                raise SpiffyError(f"--methods {self.methods!r}: no {kind}: {why[kind]}")

    def digests(self, paper: DraftGraph | None) -> dict[str, str]:
        """Of what is compared with the graph, by kind."""
        found = {} if paper is None else {"paper": paper.digest()}
        if self.order is not None:
            found["order"] = sha256(self.order.read_bytes()).hexdigest()
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
                    f"--budgets {self.budgets}: {word!r} is no number of drafts from 1 to the "
                    f"graph's {artifact.budget}"
                )
            found.append(int(word))
        return sorted(set(found))


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
        from spiffy.calib.ranks import Ranks

        if Ranks.from_environment().world > 1:
            raise SpiffyError("several ranks would write the same --out: measure with one process")
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = f"--out {self.out}: cannot be written to ({error.strerror})"
            raise SpiffyError(problem) from None
        for name in (*FILES, ROWS_SO_FAR):
            check_writable(self.out / name)
        if (self.out / FILES[0]).exists():
            log.print(
                f"{self.out} holds a benchmark already, which will be replaced once this one ends",
                soft_wrap=True,
            )


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
    Stopped by Ctrl-C, SIGTERM or an error, it sums up the prompts that all methods have decoded.

    Example: spiffy-bench --graph llada.json --samples 12 --out out/llada
    """
    artifact = DraftGraph.find(graph)
    methods.check(artifact)
    encoding.check()
    decoding.check()
    shape.check()
    output.make_folder()
    with doing("loading") as status:
        from spiffy.bench.measure import load_average, machine

        load = load_average()
        run = _prepared(artifact, graph, model, shape, prompts, encoding, decoding, methods, status)
    found, stopped_by = measured(run, methods.execute_code, output.out)
    write_rows(output.out, found)  # first: what follows may fail, after hours
    with doing("summing up"):
        profile = None
        if stopped_by is None:  # what stopped it would stop that, too
            try:
                profile = profile_of(run)
            except (KeyboardInterrupt, Exception) as problem:  # hours of rows are to be written
                stopped_by = problem
        summary = summed_up(run, found, machine(run.lm, load), profile)
        written = write_files(output.out, summary)
    note_if_inexact(run.settings)
    print_table(summary)
    log.print(f"wrote {', '.join(str(path) for path in written)}", soft_wrap=True)
    if stopped_by is not None:
        part = f"{found.prompts} of {len(run.prompts)} prompts, {found.repeats} of "
        part += f"{methods.repeats} repeats"
        log.print(f"stopped early: summed up are {part}, by all methods", soft_wrap=True)
        raise typer.Exit(INTERRUPTED) if isinstance(stopped_by, KeyboardInterrupt) else stopped_by
    if run.settings.exact and any(result.differing for result in summary.results):
        note_of_ties(run.lm)
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
    status: Doing,
) -> Run:
    """Load the model, draw the prompts, set up the methods."""
    from spiffy.bench.methods import methods as methods_of
    from spiffy.bench.order import load_order
    from spiffy.bench.score import has_tests

    threads = read_threads(model.threads)
    drawn = prompts.draw(decoding.seed)
    prompts.note_toys(artifact)
    rival = None if methods.paper is None else DraftGraph.find(methods.paper)
    network = None if methods.order is None else load_order(methods.order)
    asked = model if shape.shape is None else replace(model, prepack=False)  # grown, then prepacked
    lm = asked.load(artifact, place)
    small = lm.fingerprint
    lm, (ours, rival) = shape.grown(model, lm, (artifact, rival))
    artifact = ours or artifact
    kinds, numbers = methods.kinds(), methods.numbers(artifact)
    compared = ("static", "threshold") if "plain" in kinds else ()  # plain decoding by both
    settings = decoding.settings(lm, artifact, model.any_model, compared)
    edges = decoding.block_edges()
    set_threads(lm, settings, threads)
    warn_of_differences(artifact, settings)
    chosen = decodable(lm, settings, drawn.texts, raw=encoding.raw, system=encoding.system)
    encoding.note_spelled(lm, drawn.texts)
    texts, ids = [drawn.texts[index] for index, _ in chosen], [ids for _, ids in chosen]
    known = prompts.known(texts, artifact)
    if rival is not None:
        check_rival(rival, settings, numbers)
        prompts.known(texts, rival, "the graph of --paper")
    ready_to_draft(artifact, status)
    records = [drawn.records[index] for index, _ in chosen]
    if methods.execute_code:
        if not any(map(has_tests, records)):
            raise SpiffyError(f"--execute-code: no prompt of {drawn.dataset} has tests to run")
        log.print("--execute-code runs what the model writes, in a process with limits")
    known_costs = costs_known(lm, settings, edges, artifact, ids) if "auto" in kinds else None
    found = methods_of(
        lm, settings, artifact, kinds, numbers, rival, ids, edges, model.any_model, network, small
    )
    methods.check_all_there(found, settings.cache)
    return Run(
        lm=lm,
        artifact=artifact,
        settings=settings,
        edges=edges,
        methods=found,
        texts=texts,
        prompts=ids,
        records=records,
        data=DataRecord(
            dataset=drawn.dataset,
            sha256=drawn.sha256,
            samples=len(texts),
            left_out=len(drawn.texts) - len(texts),
            seed=decoding.seed,
            calibrated_on=known,
            warm_up=methods.warm_up,
            repeats=methods.repeats,
            raw=encoding.raw,
            system=encoding.system,
        ),
        adapter=model.adapter,
        compared_with=methods.digests(rival),
        costs_known=known_costs,
    )


def main() -> None:
    """Entry point of `spiffy-bench`."""
    run_app(app)


if __name__ == "__main__":
    main()
