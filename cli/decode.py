"""`spiffy-decode`: decode prompts speculatively, and prove that nothing changed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

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
    decodable,
    log,
    model_of,
    note_if_inexact,
    note_skipped,
    progress_bar,
    run_app,
    warn_of_differences,
)
from spiffy.schemas import DraftGraph, SpiffyError
from spiffy.schemas.graph import MOST_UNASKED

if TYPE_CHECKING:
    from rich.console import Console

    from spiffy.runtime import BlockEdges
    from spiffy.runtime.auto import Plan
    from spiffy.runtime.draft import Drafter
    from spiffy.runtime.generate import Output
    from spiffy.runtime.models import DiffusionLM
    from spiffy.schemas import DecodingSettings

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def decode(
    graph: Annotated[Path | None, typer.Option(help="Draft graph; without one: plain.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Alias, hub id or folder. Default: the graph's model.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="One prompt.")] = None,
    prompts: Annotated[
        str | None,
        typer.Option(help="JSONL file with a 'prompt' or 'question' field, or a dataset name."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Draw this many of the prompts (default: all, in order).")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Drafts per forward. Default: all of the graph's, at most 128. auto: as many as "
            "pay on this machine. With --verify also several, such as 1,8,32."
        ),
    ] = None,
    remeasure: Annotated[
        bool,
        typer.Option(
            "--remeasure", help="With --budget auto: time this machine again, forget earlier times."
        ),
    ] = False,
    speculation: Annotated[
        bool, typer.Option("--speculation/--no-speculation", help="Draft, or decode plainly.")
    ] = True,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Also decode plainly, compare; exit 1 if any token differs."),
    ] = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="Print blocks as they are finished.")
    ] = False,
    json_lines: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per prompt.")
    ] = False,
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
    seed: Annotated[int, typer.Option(help="Noise if the temperature is above 0; sampling.")] = 0,
    edges: EdgesOption = "all",
    skip_bad: SkipBadOption = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    version: Annotated[bool, VERSION_OPTION] = False,
) -> None:
    """Decode prompts with a draft graph: fewer model calls, the same tokens.

    The prompt is --prompt, or every prompt of --prompts, or standard input. Decoding settings come
    from the graph unless given.

    Example: spiffy-decode --graph llada.json --prompt "Tom has 3 apples. He buys 4 more. How many?"
    """
    if stream and (json_lines or verify):
        raise SpiffyError("--stream prints plain text as it comes: drop --json and --verify")
    artifact = None if graph is None else DraftGraph.load(graph)
    if artifact is None and model is None:
        raise SpiffyError("give --graph FILE.json, or --model NAME to decode plainly")
    if verify and (artifact is None or not speculation):
        raise SpiffyError(
            "--verify compares drafting with plain decoding: give --graph, and drop "
            "--no-speculation"
        )
    budgets = _budgets(budget, artifact if speculation else None)
    if remeasure and "auto" not in budgets:
        raise SpiffyError("--remeasure times this machine for --budget auto: give that too")
    if len(budgets) > 1 and not verify:
        raise SpiffyError(f"--budget {budget}: several budgets need --verify, to compare them")
    if skip_bad and prompts is None:
        raise SpiffyError("--skip-bad leaves out lines of --prompts: give a file")
    texts = _texts(prompt, prompts, samples, seed, skip_bad)

    with log.status("loading"):
        from spiffy.runtime import decoding_settings, load_model

        switches = block_edges(edges)
        if model is None and artifact is not None:
            lm = model_of(artifact, graph, device, dtype)
        else:
            lm = load_model(str(model), device=device, dtype=dtype)
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
        runs = _Runs(lm, settings, seed, switches, decodable(lm, settings, texts))
        if artifact is not None and budgets:
            warn_of_differences(artifact, settings)
        runs.drafters = _drafters(runs, artifact, budgets, remeasure)

    out = log if json_lines else console
    if verify:
        runs.drafters = {"plain": None, **runs.drafters}
        runs.decode(runs.prompts[0], "plain")  # warm-up, not counted
        runs.outputs.clear()
        with progress_bar() as bar:
            for prompt_of in bar.track(runs.prompts, description="decoding both ways"):
                for name in runs.drafters:  # prompt by prompt, so that drift hits all alike
                    runs.decode(prompt_of, name)
        identical = _compare(runs, out)
        if json_lines:
            for (index, _), output in zip(runs.prompts, runs.outputs[runs.shown], strict=True):
                _print_json(index, output)
        if not identical:
            raise typer.Exit(1)
        return
    for prompt_of in runs.prompts:
        for partial in runs.stream(prompt_of, runs.shown):
            if stream:
                _write(partial)
        output = runs.outputs[runs.shown][-1]
        if json_lines:
            _print_json(prompt_of[0], output)
        else:
            _write("\n" if stream else output.text + "\n")
    _report(runs)


def _texts(
    prompt: str | None, prompts: str | None, samples: int | None, seed: int, skip_bad: bool
) -> list[str]:
    if prompt is not None and prompts is not None:
        raise SpiffyError("--prompt and --prompts exclude each other")
    if prompts is not None:
        from spiffy.calib.prompts import load_prompts

        drawn = load_prompts(prompts, samples, seed, split="test", skip_bad=skip_bad)
        note_skipped(drawn.skipped, prompts)
        return list(drawn.texts)
    if samples is not None:
        raise SpiffyError("--samples draws from --prompts: give a file or a dataset")
    if prompt is None:
        if sys.stdin.isatty():
            log.print("reading the prompt from standard input, end with Ctrl-D")
        prompt = sys.stdin.buffer.read().decode("utf-8", errors="surrogateescape").strip("\n")
    return [prompt]


def _budgets(budget: str | None, artifact: DraftGraph | None) -> list[int | Literal["auto"]]:
    """Budgets asked for; the graph's own if none."""
    if artifact is None:
        if budget is not None:
            raise SpiffyError("--budget counts drafts: give --graph, and drop --no-speculation")
        return []
    if budget is None:
        return [min(artifact.budget, MOST_UNASKED)]
    budgets: list[int | Literal["auto"]] = []
    for word in map(str.strip, budget.split(",")):
        if word == "auto":
            if not artifact.expected_steps:
                raise SpiffyError("--budget auto: the graph has no expected_steps; calibrate again")
            budgets.append("auto")
        elif word.removeprefix("-").isdecimal() and len(word) < 10:
            if int(word) < 1:
                raise SpiffyError(f"--budget {word}: must be at least 1 draft")
            budgets.append(min(int(word), artifact.budget))
        else:
            raise SpiffyError(f"--budget {budget!r}: give a number of drafts, or auto")
    return budgets


def _drafters(
    runs: _Runs,
    artifact: DraftGraph | None,
    budgets: list[int | Literal["auto"]],
    remeasure: bool,
) -> dict[str, Drafter | None]:
    from spiffy.runtime.generate import auto_drafter, graph_drafter, make_task

    if artifact is None or not budgets:
        return {"plain": None}
    drafters: dict[str, Drafter | None] = {}
    for budget in budgets:
        if budget == "auto":
            tasks = [
                make_task(runs.lm, text, runs.settings, edges=runs.edges)
                for _, text in runs.prompts
            ]
            tasks.sort(key=lambda task: len(task.prompt))
            plan, drafter = auto_drafter(tasks[len(tasks) // 2], artifact, remeasure=remeasure)
            log.print(f"budget auto: {_describe(plan)}")
            drafters[f"auto: {plan.drafts} drafts"] = drafter
        else:
            drafters[f"{budget} drafts"] = graph_drafter(runs.lm, artifact, runs.settings, budget)
    return drafters


def _describe(plan: Plan) -> str:
    if plan.selection is None:
        return "no drafts, plain decoding is fastest here"
    chosen = "acceptance model" if plan.selection == "model" else "graph"
    return f"up to {plan.drafts} drafts by the {chosen}, predicted {plan.speedup:.2f}x plain"


@dataclass
class _Runs:
    """Decodes prompts with one or several drafters, and keeps the outputs by drafter."""

    lm: DiffusionLM
    settings: DecodingSettings
    seed: int
    edges: BlockEdges
    prompts: list[tuple[int, str]]
    drafters: dict[str, Drafter | None] = field(default_factory=dict)
    outputs: dict[str, list[Output]] = field(default_factory=dict)
    fitting: dict[str, int] = field(default_factory=dict)  # drafts that memory allows

    @property
    def shown(self) -> str:
        """Whose answers are printed."""
        return next(reversed(self.drafters))

    def decode(self, prompt: tuple[int, str], name: str) -> None:
        """Decode one prompt with one drafter."""
        for _ in self.stream(prompt, name):
            pass

    def stream(self, prompt: tuple[int, str], name: str) -> Iterator[str]:
        """Decode one prompt; yields the text of each block when it is finished."""
        from spiffy.runtime.decode import run
        from spiffy.runtime.generate import answer_ids, collect, make_task

        sequence, text = prompt
        drafter = self.drafters[name]
        task = make_task(self.lm, text, self.settings, drafter, self.seed, sequence, self.edges)
        task.most_drafts = min(task.most_drafts, self.fitting.get(name, task.most_drafts))
        printed, block = "", 0
        for _ in run(self.lm, [task]):
            cursor = task.path[-1] if task.path else None
            if cursor is not None and (cursor.block > block or cursor.finished):
                block = cursor.block
                # A character may still lack bytes that the next block brings.
                full = self.lm.decode_text(answer_ids(task))
                full = full if cursor.finished else full.rstrip("\ufffd")
                yield full[len(printed) :]
                printed = full
        if task.stats.halvings:
            self.fitting[name] = task.most_drafts
            log.print(
                f"out of memory: going on with at most {task.most_drafts} drafts per forward, "
                "the tokens stay the same",
                soft_wrap=True,
            )
        self.outputs.setdefault(name, []).append(collect(task))


def _totals(outputs: Sequence[Output]) -> dict[str, float]:
    """Sums over prompts."""
    stats = [asdict(output.stats) for output in outputs]
    totals: dict[str, float] = {key: sum(s[key] for s in stats) for key in stats[0]}
    totals["tokens"] = sum(len(output.token_ids) for output in outputs)
    return totals


def _compare(runs: _Runs, out: Console) -> bool:
    """Print the table that --verify ends in; whether all answers are those of plain decoding."""
    settings, plain = runs.settings, runs.outputs["plain"]
    base = _totals(plain)
    table = Table(
        title=f"{runs.lm.name}: {settings.policy}, cache {settings.cache}, "
        f"block {settings.block_length}, {len(plain)} prompts"
    )
    table.add_column("")
    table.add_column("plain", justify="right")
    rows: dict[str, list[str]] = {
        "prompts": [str(len(plain))],
        "tokens identical": ["-"],
        "NFE (model forwards)": [f"{base['nfe']:.0f}"],
        "positions computed": [f"{base['positions_computed']:.0f}"],
        "steps per forward": [f"{base['steps'] / base['nfe']:.2f}"],
        "tokens/s": [f"{base['tokens'] / base['seconds']:.1f}"],
    }
    differing = 0
    for name, outputs in runs.outputs.items():
        if name == "plain":
            continue
        table.add_column(name, justify="right")
        ours = _totals(outputs)
        wrong = sum(a.token_ids != b.token_ids for a, b in zip(plain, outputs, strict=True))
        differing += wrong
        speed = (ours["tokens"] / ours["seconds"]) / (base["tokens"] / base["seconds"])
        rows["prompts"].append(str(len(outputs)))
        rows["tokens identical"].append(f"no ({wrong} prompts differ)" if wrong else "yes")
        rows["NFE (model forwards)"].append(
            f"{ours['nfe']:.0f} ({base['nfe'] / ours['nfe']:.2f}x fewer)"
        )
        rows["positions computed"].append(
            f"{ours['positions_computed']:.0f} "
            f"({ours['positions_computed'] / base['positions_computed']:.2f}x)"
        )
        rows["steps per forward"].append(f"{ours['steps'] / ours['nfe']:.2f}")
        rows["tokens/s"].append(f"{ours['tokens'] / ours['seconds']:.1f} ({speed:.2f}x)")
    for label, cells in rows.items():
        table.add_row(label, *cells)
    out.print(table)
    note_if_inexact(settings)
    return not differing


def _report(runs: _Runs) -> None:
    totals = _totals(runs.outputs[runs.shown])
    log.print(
        f"{totals['tokens']:.0f} tokens, {totals['nfe']:.0f} forwards, "
        f"{totals['positions_computed']:.0f} positions, "
        f"{totals['steps'] / totals['nfe']:.2f} steps per forward, "
        f"{totals['tokens'] / totals['seconds']:.1f} tokens/s"
    )
    if runs.shown != "plain":
        note_if_inexact(runs.settings)


def _write(text: str) -> None:
    """Print an answer as it is: rich would expand tabs and emoji codes."""
    sys.stdout.write(text)
    sys.stdout.flush()


def _print_json(index: int, output: Output) -> None:
    stats = output.stats
    record: dict[str, Any] = {
        "index": index,
        "text": output.text,
        "token_ids": output.token_ids,
        "nfe": stats.nfe,
        "positions_computed": stats.positions_computed,
        "steps": stats.steps,
        "accepted": stats.accepted,
        "seconds": round(stats.seconds, 6),
    }
    _write(json.dumps(record, ensure_ascii=False) + "\n")


def main() -> None:
    """Entry point of `spiffy-decode`."""
    run_app(app)


if __name__ == "__main__":
    main()
