"""`spiffy-decode`: decode prompts speculatively, and prove that nothing changed."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from spiffy.cli.common import (
    console,
    decodable,
    log,
    note_skipped,
    progress_bar,
    run_app,
    warn_of_differences,
)
from spiffy.cli.decode_runs import Runs, compare, print_json, report, write
from spiffy.cli.options import (
    Decoding,
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
from spiffy.schemas import DraftGraph, SpiffyError
from spiffy.schemas.records import MOST_UNASKED

if TYPE_CHECKING:
    from spiffy.runtime.budget.auto import Plan
    from spiffy.runtime.draft import Drafter

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

Budget = int | Literal["auto"]


@dataclass(frozen=True)
class _Prompts:
    """Where the prompts come from."""

    prompt: Annotated[str | None, prompt_option(help="One prompt.")] = None
    prompts: Annotated[
        str | None,
        prompt_option(help="JSONL file with a 'prompt' or 'question' field, or a dataset name."),
    ] = None
    samples: Annotated[
        int | None, prompt_option(help="Draw this many of the prompts (default: all, in order).")
    ] = None
    skip_bad: SkipBad = False

    def check(self) -> None:
        """Refuse options that exclude each other or lack another."""
        if self.prompt is not None and self.prompts is not None:
            raise SpiffyError("--prompt and --prompts exclude each other")
        if self.skip_bad and self.prompts is None:
            raise SpiffyError("--skip-bad leaves out lines of --prompts: give a file")
        if self.samples is not None and self.prompts is None:
            raise SpiffyError("--samples draws from --prompts: give a file or a dataset")

    def texts(self, seed: int) -> list[str]:
        """Read them: the one given, those of a file or data set, or standard input."""
        if self.prompts is not None:
            drawn = draw(self.prompts, self.samples, seed, test=True, skip_bad=self.skip_bad)
            note_skipped(drawn.skipped, self.prompts)
            return list(drawn.texts)
        if self.prompt is not None:
            return [self.prompt]
        if sys.stdin.isatty():
            log.print("reading the prompt from standard input, end with Ctrl-D")
        text = sys.stdin.buffer.read().decode("utf-8", errors="surrogateescape")
        return [text.strip("\n")]


@dataclass(frozen=True)
class _Drafting:
    """How many drafts there are, if any."""

    budget: Annotated[
        str | None,
        drafting_option(
            help="Drafts per forward. Default: all of the graph's, at most 128. auto: as many as "
            "pay on this machine. With --verify also several, such as 1,8,32."
        ),
    ] = None
    remeasure: Annotated[
        bool,
        drafting_option(
            "--remeasure", help="With --budget auto: time this machine again, forget earlier times."
        ),
    ] = False
    speculation: Annotated[
        bool, drafting_option("--speculation/--no-speculation", help="Draft, or decode plainly.")
    ] = True

    def budgets(self, artifact: DraftGraph | None, several: bool) -> list[Budget]:
        """Budgets asked for; the graph's own if none. `several` says whether more than one may be.

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
            found = [min(artifact.budget, MOST_UNASKED)]
        else:
            found = [self._budget(word.strip(), artifact) for word in self.budget.split(",")]
        if self.remeasure and "auto" not in found:
            raise SpiffyError("--remeasure times this machine for --budget auto: give that too")
        if len(found) > 1 and not several:
            raise SpiffyError(
                f"--budget {self.budget}: several budgets need --verify, to compare them"
            )
        return found

    def _budget(self, word: str, artifact: DraftGraph) -> Budget:
        if word == "auto":
            if not artifact.expected_steps:
                raise SpiffyError("--budget auto: the graph has no expected_steps; calibrate again")
            return "auto"
        if word.removeprefix("-").isdecimal() and len(word) < 10:
            if int(word) < 1:
                raise SpiffyError(f"--budget {word}: must be at least 1 draft")
            return min(int(word), artifact.budget)
        raise SpiffyError(f"--budget {self.budget!r}: give a number of drafts, or auto")

    def drafters(
        self, runs: Runs, artifact: DraftGraph | None, budgets: list[Budget]
    ) -> dict[str, Drafter | None]:
        """A drafter for every budget, by name; plain decoding if there is none."""
        from spiffy.runtime.draft import graph_drafter

        if artifact is None or not budgets:
            return {"plain": None}
        drafters: dict[str, Drafter | None] = {}
        for budget in budgets:
            if budget == "auto":
                plan, drafter = self._auto(runs, artifact)
                drafters[f"auto: {plan.drafts} drafts"] = drafter
            else:
                named = f"{budget} drafts"
                drafters[named] = graph_drafter(runs.lm, artifact, runs.settings, budget)
        return drafters

    def _auto(self, runs: Runs, artifact: DraftGraph) -> tuple[Plan, Drafter | None]:
        from spiffy.runtime.budget.auto import auto_drafter
        from spiffy.runtime.decode import make_task

        tasks = [
            make_task(runs.lm, text, runs.settings, edges=runs.edges) for _, text in runs.prompts
        ]
        tasks.sort(key=lambda task: len(task.prompt))
        task = tasks[len(tasks) // 2]
        plan, drafter = auto_drafter(task, artifact, remeasure=self.remeasure)
        log.print(f"budget auto: {_describe(plan)}")
        return plan, drafter


def _describe(plan: Plan) -> str:
    if plan.selection is None:
        return "no drafts, plain decoding is fastest here"
    chosen = "acceptance model" if plan.selection == "model" else "graph"
    return f"up to {plan.drafts} drafts by the {chosen}, predicted {plan.speedup:.2f}x plain"


@dataclass(frozen=True)
class _Output:
    """What is printed."""

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

    def check(self, drafts: bool) -> None:
        """Refuse options that exclude each other; `drafts` says whether there are any."""
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
    graph: Annotated[Path | None, model_option(help="Draft graph; without one: plain.")] = None,
    *,
    model: ModelOfGraph,
    prompts: _Prompts,
    decoding: Decoding,
    drafting: _Drafting,
    output: _Output,
    version: VersionOption = False,
) -> None:
    """Decode prompts with a draft graph: fewer model calls, the same tokens.

    The prompt is --prompt, or every prompt of --prompts, or standard input. Decoding settings come
    from the graph unless given.

    Example: spiffy-decode --graph llada.json --prompt "Tom has 3 apples. He buys 4 more. How many?"
    """
    prompts.check()
    artifact = None if graph is None else DraftGraph.load(graph)
    if artifact is None and model.model is None:
        raise SpiffyError("give --graph FILE.json, or --model NAME to decode plainly")
    output.check(drafts=artifact is not None and drafting.speculation)
    budgets = drafting.budgets(artifact, several=output.verify)
    texts = prompts.texts(decoding.seed)
    with log.status("loading"):
        edges = decoding.block_edges()
        lm = model.load(artifact, graph)
        settings = decoding.settings(lm, artifact)
        runs = Runs(lm, settings, decoding.seed, edges, decodable(lm, settings, texts))
        if artifact is not None and budgets:
            warn_of_differences(artifact, settings)
        runs.drafters = drafting.drafters(runs, artifact, budgets)
    if output.verify:
        _verify(runs, output.json)
    else:
        _answer(runs, output)


def _verify(runs: Runs, json_lines: bool) -> None:
    """Decode plainly too, and compare; exit code 1 if a token differs."""
    runs.drafters = {"plain": None, **runs.drafters}
    runs.decode(runs.prompts[0], "plain")  # warm-up, not counted
    runs.outputs.clear()
    with progress_bar() as bar:
        for prompt in bar.track(runs.prompts, description="decoding both ways"):
            for name in runs.drafters:  # prompt by prompt, so that drift hits all alike
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
        for partial in runs.stream(prompt, runs.shown):
            if output.stream:
                write(partial)
        answer = runs.outputs[runs.shown][-1]
        if output.json:
            print_json(prompt[0], answer)
        else:
            write("\n" if output.stream else answer.text + "\n")
    report(runs)


def main() -> None:
    """Entry point of `spiffy-decode`."""
    run_app(app)


if __name__ == "__main__":
    main()
