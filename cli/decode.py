"""`spiffy-decode`: decode prompts speculatively, and prove that nothing changed."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spiffy.calib.folder import check_begun_or_new
from spiffy.calib.ranks import Ranks
from spiffy.cli.common import (
    console,
    decodable,
    doing,
    log,
    note_fewer,
    note_left_out,
    note_skipped,
    progress_bar,
    ready_to_draft,
    resumable,
    run_app,
    warn_of_differences,
)
from spiffy.cli.decode_out import decode_into
from spiffy.cli.decode_runs import Runs, Way, compare, print_json, report
from spiffy.cli.options import (
    Decoding,
    Encoding,
    Field,
    ModelOfGraph,
    SkipBad,
    VersionOption,
    decoding_option,
    drafting_option,
    model_option,
    output_option,
    prompt_option,
    read_budget,
    spread,
)
from spiffy.cli.streams import write
from spiffy.cli.threads import read_threads, set_threads
from spiffy.schemas import Budget, DraftGraph, SpiffyError
from spiffy.schemas.errors import is_of_one_decode, said
from spiffy.schemas.io import check_writable

if TYPE_CHECKING:
    from torch import Tensor

    from spiffy.calib.prompts import PromptSet
    from spiffy.runtime.budget.auto import AutoBudget
    from spiffy.runtime.generate import Output

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class _Prompts:
    """Where the prompts come from."""

    prompt: Annotated[str | None, prompt_option(help="One prompt.")] = None
    prompts: Annotated[
        str | None,
        prompt_option(
            help="File of prompts (JSONL, JSON, CSV, Parquet), or a dataset as for "
            "spiffy-calibrate --dataset."
        ),
    ] = None
    samples: Annotated[
        int | None, prompt_option(help="Draw this many of the prompts (default: all, in order).")
    ] = None
    skip_bad: SkipBad = False
    field: Field = None

    def check(self) -> None:
        """Refuse options that exclude each other or lack another."""
        if self.prompt is not None and self.prompts is not None:
            raise SpiffyError("--prompt and --prompts exclude each other")
        if self.skip_bad and self.prompts is None:
            raise SpiffyError("--skip-bad leaves out lines of --prompts: give a file")
        if self.field is not None and self.prompts is None:
            raise SpiffyError("--field names a field of --prompts: give a file")
        if self.samples is not None and self.prompts is None:
            raise SpiffyError("--samples draws from --prompts: give a file or a dataset")

    def drawn(self, seed: int) -> PromptSet:
        """Read them: the one given, those of a file or data set, or standard input."""
        from spiffy.calib.prompts import PromptSet, load_prompts

        if self.prompts is not None:
            drawn = load_prompts(
                self.prompts,
                self.samples,
                seed,
                split="test",
                skip_bad=self.skip_bad,
                field=self.field,
            )
            note_skipped(drawn.skipped, self.prompts)
            note_fewer(drawn, self.samples)
            return drawn
        if self.prompt is not None:
            return PromptSet("--prompt", (self.prompt,))
        if sys.stdin is None:  # closed by whoever started this
            raise SpiffyError("standard input is closed: give --prompt or --prompts")
        if sys.stdin.isatty():
            log.print("reading the prompt from standard input, end with Ctrl-D")
        text = sys.stdin.buffer.read().decode("utf-8", errors="surrogateescape")
        if not text.strip():
            raise SpiffyError(
                "no prompt: give --prompt TEXT, --prompts FILE, or text on standard input"
            )
        return PromptSet("standard input", (text.removeprefix("\ufeff").strip("\r\n"),))


@dataclass(frozen=True)
class _Drafting:
    """How many drafts there are, if any."""

    budget: Annotated[
        str | None,
        drafting_option(
            help="Most drafts per forward. auto (default): as many as pay on this machine, none "
            "where none do, learned while decoding. A number may exceed the graph's, if it has an "
            "acceptance model. With --verify also several, such as auto,8,32."
        ),
    ] = None
    remeasure: Annotated[
        bool,
        drafting_option(
            "--remeasure", help="With --budget auto: time this machine first, forget earlier times."
        ),
    ] = False
    speculation: Annotated[
        bool, drafting_option("--speculation/--no-speculation", help="Draft, or decode plainly.")
    ] = True

    def budgets(self, artifact: DraftGraph | None, several: bool) -> list[Budget]:
        """Budgets asked for; auto if none. `several` says whether more than one may be.

        Raises
        ------
        SpiffyError
            If there is nothing to draft with, or a budget is none.
        """
        if not self.speculation or artifact is None:
            if self.budget is not None:
                raise SpiffyError("--budget counts drafts: give --graph, and drop --no-speculation")
            found: list[Budget] = []
        elif self.budget is None:
            found = ["auto"]
        else:
            found = [read_budget(word.strip()) for word in self.budget.split(",")]
        if self.remeasure and "auto" not in found:
            raise SpiffyError("--remeasure times this machine for --budget auto: give that too")
        if len(found) > 1 and not several:
            raise SpiffyError(
                f"--budget {self.budget}: several budgets need --verify, to compare them"
            )
        return found

    def ways(
        self, runs: Runs, artifact: DraftGraph | None, budgets: Sequence[Budget]
    ) -> dict[str, Way]:
        """A way of decoding for every budget, by name; plain if there is none."""
        from spiffy.runtime.draft import graph_drafter

        if artifact is None or not budgets:
            return {"plain": Way()}
        ways: dict[str, Way] = {}
        for budget in budgets:
            if budget == "auto":
                ways["auto"] = Way(adviser=self._auto(runs, artifact))
            else:
                drafter = graph_drafter(runs.lm, artifact, runs.settings, budget)
                ways[f"{budget} drafts"] = Way(drafter)
        return ways

    def _auto(self, runs: Runs, artifact: DraftGraph) -> AutoBudget | None:
        from spiffy.runtime.budget.auto import auto_budget
        from spiffy.runtime.budget.predict import auto_profile
        from spiffy.runtime.decode import make_task, median_task

        task = median_task(
            make_task(runs.lm, ids, runs.settings, edges=runs.edges) for _, ids in runs.prompts
        )
        prior = auto_profile(task, artifact, remeasure=True) if self.remeasure else None
        return auto_budget(task, artifact, prior=prior)


@dataclass(frozen=True)
class _Output:
    """What is printed, or written."""

    verify: Annotated[
        bool,
        output_option(
            "--verify", help="Also decode plainly, compare; exit 1 if any token differs."
        ),
    ] = False
    stream: Annotated[
        bool, output_option("--stream", help="Print blocks as they are finished.")
    ] = False
    json: Annotated[bool, output_option("--json", help="Print one JSON object per prompt.")] = False
    batch_size: Annotated[
        int,
        decoding_option(
            min=1,
            help="Prompts that share forwards. With --json answers are printed as they finish, "
            "else in order.",
        ),
    ] = 1
    out: Annotated[
        Path | None,
        output_option(
            help="Write the objects of --json to this file instead, in order, when all prompts of "
            "--prompts are decoded. Answers are kept as they come: after an interruption the same "
            "command goes on, and under torchrun several processes share the prompts."
        ),
    ] = None
    stop: Annotated[
        list[str] | None,
        output_option(
            help="End an answer before this text, once its block is done; may be given several "
            "times. A line end is $'\\n' in most shells."
        ),
    ] = None

    def check(self, drafts: bool, prompts: str | None, ranks: Ranks) -> None:
        """Refuse options that exclude each other; `drafts` says whether there are any."""
        if self.batch_size > 1 and (self.stream or self.verify):
            raise SpiffyError(
                "--batch-size decodes prompts together: drop --stream and --verify, which take one "
                "after the other"
            )
        if self.out is not None:
            if self.json or self.stream or self.verify:
                raise SpiffyError(
                    "--out writes answers and prints none: drop --json, --stream, --verify"
                )
            if prompts is None:
                raise SpiffyError("--out is for the answers to a file of prompts: give --prompts")
            check_writable(self.out)
            check_begun_or_new(self.out)
        elif ranks.world > 1:
            raise SpiffyError("several ranks: give --out, which they share")
        if self.stream and (self.json or self.verify):
            raise SpiffyError("--stream prints plain text as it comes: drop --json and --verify")
        if self.verify and not drafts:
            raise SpiffyError(
                "--verify compares drafting with plain decoding: give --graph, and drop "
                "--no-speculation"
            )


@app.command()
@spread
def decode(
    graph: Annotated[
        str | None,
        model_option(
            help="Draft graph: a file, a folder or a hub id (owner/name) that has "
            "draft_graph.json; without one: plain."
        ),
    ] = None,
    *,
    model: ModelOfGraph,
    prompts: _Prompts,
    encoding: Encoding,
    decoding: Decoding,
    drafting: _Drafting,
    output: _Output,
    version: VersionOption = False,
) -> None:
    """Decode prompts with a draft graph: fewer model calls, the same tokens.

    The prompt is --prompt, or every prompt of --prompts, or standard input. Decoding settings come
    from the graph unless given.

    Example: spiffy-decode --graph llada.json --prompt "Lily has 9 old pens and buys 2 new pens. How
    many pens are there now?"
    """
    prompts.check()
    encoding.check()
    decoding.check()
    artifact = None if graph is None else DraftGraph.find(graph)
    if artifact is None and model.model is None:
        raise SpiffyError("give --graph FILE.json, or --model NAME to decode plainly")
    if artifact is None and model.any_model:
        raise SpiffyError("--any-model takes a graph of another model: give --graph, or drop it")
    ranks = Ranks.from_environment()
    speculative = artifact is not None and drafting.speculation
    output.check(speculative, prompts.prompts, ranks)
    budgets = drafting.budgets(artifact, several=output.verify)
    threads = read_threads(model.threads)
    with resumable(output.out, ranks):
        drawn = prompts.drawn(decoding.seed)
        drawn = replace(drawn, raw=encoding.raw, system=encoding.system)
        with doing("loading") as status:
            edges = decoding.block_edges()
            lm = replace(model, device=ranks.device(model.device)).load(artifact, graph)
            settings = decoding.settings(lm, artifact, model.any_model)
            set_threads(lm, settings, threads)
            chosen = decodable(lm, settings, drawn.texts, raw=encoding.raw, system=encoding.system)
            runs = Runs(lm, settings, decoding.seed, edges, chosen, tuple(output.stop or ()))
            encoding.note_spelled(lm, drawn.texts)
            if artifact is not None and budgets:
                warn_of_differences(artifact, settings)
                ready_to_draft(artifact, status)
            runs.ways = drafting.ways(runs, artifact, budgets)
        if output.out is not None:
            budget = next(iter(budgets), None)
            decode_into(output.out, runs, drawn, artifact, budget, ranks, output.batch_size)
        elif output.verify:
            assert artifact is not None  # output.check
            some = min(8, artifact.budget)  # auto may know its costs, and has drafted nothing yet
            fixed = {some if budget == "auto" else budget for budget in budgets} - {0}
            warming = {"plain": Way(), **drafting.ways(runs, artifact, sorted(fixed))}
            _verify(runs, warming, output.json)
        elif output.batch_size > 1:
            _answer_together(runs, output.batch_size, output.json)
        else:
            _answer(runs, output)


def _verify(runs: Runs, warming: Mapping[str, Way], json_lines: bool) -> None:
    """Decode plainly too, and compare; exit code 1 if a token differs.

    Before that the ways of `warming` decode the first prompt, uncounted: what they learn is theirs.
    """
    ways, runs.ways = runs.ways, dict(warming)
    for name in warming:
        runs.decode(runs.prompts[0], name)
    runs.outputs.clear()
    runs.ways = {"plain": Way(), **ways}
    with progress_bar() as bar:
        for prompt in bar.track(runs.prompts, description="decoding both ways"):
            for name in runs.ways:  # prompt by prompt, so that drift hits all alike
                runs.decode(prompt, name)
    identical = compare(runs, log if json_lines else console)
    if json_lines:
        for (index, _), output in zip(runs.prompts, runs.outputs[runs.shown], strict=True):
            print_json(index, output)
    if not identical:
        raise typer.Exit(1)


def _answer(runs: Runs, output: _Output) -> None:
    """Decode every prompt and print its answer."""
    for prompt in runs.prompts:
        before = len(runs.outputs.get(runs.shown, ()))
        for piece in _decoded(runs, prompt, output.stream):
            write(piece)
        answers = runs.outputs.get(runs.shown, [])
        if len(answers) == before:
            continue
        if output.json:
            print_json(prompt[0], answers[-1])
        else:
            write("\n" if output.stream else answers[-1].text + "\n")
    _check_any(runs)
    report(runs)


def _decoded(runs: Runs, prompt: tuple[int, Tensor], stream: bool) -> Iterator[str]:
    """Decode a prompt, and say if it fails and there are others; a stream yields its pieces."""
    piece = ""
    try:
        if not stream:
            runs.decode(prompt, runs.shown)
            return
        for piece in runs.stream(prompt, runs.shown):
            yield piece
    except Exception as error:
        if len(runs.prompts) == 1 or not is_of_one_decode(error):
            raise
        if piece:
            yield "\n"  # what came before is all of its text
        note_left_out(prompt[0], said(error))


def _answer_together(runs: Runs, batch_size: int, json_lines: bool) -> None:
    """Decode prompts that share forwards; print JSON as they finish, texts in order."""
    from spiffy.runtime.generate import in_order

    outputs: list[Output] = []

    def finished() -> Iterator[tuple[int, Output | Exception]]:
        for index, output in runs.together(runs.prompts, runs.shown, batch_size):
            if isinstance(output, Exception):
                note_left_out(index, said(output))
            else:
                outputs.append(output)
                if json_lines:
                    print_json(index, output)
            yield index, output

    for output in in_order([index for index, _ in runs.prompts], finished()):
        if not json_lines and not isinstance(output, Exception):
            write(output.text + "\n")
    runs.outputs[runs.shown] = outputs
    _check_any(runs)
    report(runs)


def _check_any(runs: Runs) -> None:
    if not runs.outputs.get(runs.shown):
        raise SpiffyError(f"none of the {len(runs.prompts)} prompts could be decoded")


def main() -> None:
    """Entry point of `spiffy-decode`."""
    run_app(app)


if __name__ == "__main__":
    main()
