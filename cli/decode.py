"""`spiffy-decode`: decode prompts speculatively, and prove that nothing changed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from spiffy.cli.common import VERSION_OPTION, console, log, progress_bar, run_app
from spiffy.schemas import DraftGraph, SpiffyError

if TYPE_CHECKING:
    from spiffy.runtime.decode import Task
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
            help="Drafts per forward. Default: all of the graph's. auto: as many as pay on this "
            "machine. With --verify also several, such as 1,8,32."
        ),
    ] = None,
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
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16, float64.")] = "auto",
    version: Annotated[bool, VERSION_OPTION] = False,
) -> None:
    """Decode prompts with a draft graph: fewer model calls, the same tokens.

    The prompt is --prompt, or every prompt of --prompts, or standard input. Decoding settings come
    from the graph unless given.

    Example: spiffy-decode --graph llada.json --prompt "Tom has 3 apples. He buys 4 more. How many?"
    """
    if json_lines and stream:
        raise SpiffyError("--json and --stream exclude each other: both print to standard output")
    artifact = None if graph is None else DraftGraph.load(graph)
    if artifact is None and model is None:
        raise SpiffyError("give --graph FILE.json, or --model NAME to decode plainly")
    texts = _texts(prompt, prompts, samples, seed)

    with log.status("loading"):
        from spiffy.runtime import decoding_settings, load_model

        name = model or (artifact.model.id if artifact else "")
        lm = load_model(name, device=device, dtype=dtype)
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
        drafters = _drafters(lm, artifact if speculation else None, settings, budget, texts[0])
    if len(drafters) > 1 and not verify:
        raise SpiffyError(f"--budget {budget}: several budgets need --verify, to compare them")

    runs = _Runs(lm, settings, seed, drafters)
    if verify:
        if artifact is None or not speculation:
            raise SpiffyError("--verify compares speculative with plain decoding: give --graph")
        _warm_up(runs, texts[0])
        with progress_bar() as bar:
            for text in bar.track(texts, description="decoding both ways"):
                runs.decode(text, plain=True)
    else:
        for text in texts:
            for partial in runs.stream(text):
                if stream:
                    console.print(partial, end="", markup=False, highlight=False, soft_wrap=True)
            if stream:
                console.print()
            elif not json_lines:
                console.print(runs.last.text, markup=False, highlight=False, soft_wrap=True)
            else:
                _print_json(runs.last)
    if verify and json_lines:
        for output in runs.outputs[runs.shown]:
            _print_json(output)
    if verify:
        _compare(runs, settings)
    else:
        _report(runs)


def _texts(prompt: str | None, prompts: str | None, samples: int | None, seed: int) -> list[str]:
    if prompt is not None and prompts is not None:
        raise SpiffyError("--prompt and --prompts exclude each other")
    if prompts is not None:
        from spiffy.calib.prompts import load_prompts

        return list(load_prompts(prompts, samples, seed, split="test").texts)
    if samples is not None:
        raise SpiffyError("--samples draws from --prompts: give a file or a dataset")
    if prompt is None:
        if sys.stdin.isatty():
            log.print("reading the prompt from standard input, end with Ctrl-D")
        prompt = sys.stdin.read()
    if not prompt.strip():
        raise SpiffyError("the prompt is empty: give it at least one word")
    return [prompt]


def _drafters(
    lm: DiffusionLM,
    artifact: DraftGraph | None,
    settings: DecodingSettings,
    budget: str | None,
    text: str,
) -> dict[str, Drafter | None]:
    from spiffy.runtime.generate import graph_drafter

    if artifact is None:
        return {"plain": None}
    if budget is None:
        return {f"{artifact.budget} drafts": graph_drafter(lm, artifact, settings)}
    drafters: dict[str, Drafter | None] = {}
    for word in map(str.strip, budget.split(",")):
        if word == "auto":
            number = _best_budget(lm, artifact, settings, text)
            drafter = graph_drafter(lm, artifact, settings, number) if number else None
            drafters[f"auto: {number} drafts"] = drafter
        elif word.removeprefix("-").isdecimal():
            drafter = graph_drafter(lm, artifact, settings, int(word))
            drafters[f"{min(int(word), artifact.budget)} drafts"] = drafter
        else:
            raise SpiffyError(f"--budget {budget!r}: give a number of drafts, or auto")
    return drafters


def _best_budget(
    lm: DiffusionLM, artifact: DraftGraph, settings: DecodingSettings, text: str
) -> int:
    from spiffy.runtime.cost import best_budget, measure_cost
    from spiffy.runtime.generate import make_task

    if not artifact.expected_steps:
        raise SpiffyError("--budget auto needs a graph with expected_steps: calibrate again")
    return best_budget(artifact, measure_cost(make_task(lm, text, settings), artifact.budget))


@dataclass
class _Runs:
    """Decodes every prompt with every drafter, and keeps the outputs by drafter."""

    lm: DiffusionLM
    settings: DecodingSettings
    seed: int
    drafters: dict[str, Drafter | None]
    outputs: dict[str, list[Output]] = field(default_factory=dict)
    done: int = 0

    @property
    def shown(self) -> str:
        """Whose answers are printed."""
        return next(reversed(self.drafters))

    @property
    def last(self) -> Output:
        """The answer decoded last."""
        return self.outputs[self.shown][-1]

    def _task(self, text: str, drafter: Drafter | None) -> Task:
        from spiffy.runtime.generate import make_task

        return make_task(self.lm, text, self.settings, drafter, self.seed, self.done)

    def decode(self, text: str, plain: bool) -> None:
        """Decode one prompt with every drafter, and plainly if asked for."""
        from spiffy.runtime.decode import run
        from spiffy.runtime.generate import collect

        for name, drafter in [("plain", None)] * plain + [*self.drafters.items()]:
            task = self._task(text, drafter)
            for _ in run(self.lm, [task]):
                pass
            self.outputs.setdefault(name, []).append(collect(task))
        self.done += 1

    def stream(self, text: str) -> Iterator[str]:
        """Decode one prompt; yields the text of each block when it is finished."""
        from spiffy.runtime.decode import run
        from spiffy.runtime.generate import answer_ids, collect

        ((name, drafter),) = self.drafters.items()
        task = self._task(text, drafter)
        printed = ""
        for _ in run(self.lm, [task]):
            full = self.lm.decode_text(answer_ids(task))
            if len(full) > len(printed):
                yield full[len(printed) :]
                printed = full
        self.outputs.setdefault(name, []).append(collect(task))
        self.done += 1


def _warm_up(runs: _Runs, text: str) -> None:
    runs.decode(text, plain=True)
    runs.outputs.clear()
    runs.done = 0


def _totals(outputs: Sequence[Output]) -> dict[str, float]:
    """Sums over prompts."""
    stats = [asdict(output.stats) for output in outputs]
    totals: dict[str, float] = {key: sum(s[key] for s in stats) for key in stats[0]}
    totals["tokens"] = sum(len(output.token_ids) for output in outputs)
    return totals


def _compare(runs: _Runs, settings: DecodingSettings) -> None:
    plain = runs.outputs["plain"]
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
    for name in runs.drafters:
        outputs = runs.outputs[name]
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
    console.print(table)
    if settings.cache == "prefix":
        log.print("cache prefix is near-lossless: drafts see the root's suffix, not their own")
    if differing:
        raise typer.Exit(1)


def _report(runs: _Runs) -> None:
    totals = _totals(runs.outputs[runs.shown])
    log.print(
        f"{totals['tokens']:.0f} tokens, {totals['nfe']:.0f} forwards, "
        f"{totals['positions_computed']:.0f} positions, "
        f"{totals['steps'] / totals['nfe']:.2f} steps per forward, "
        f"{totals['tokens'] / totals['seconds']:.1f} tokens/s"
    )


def _print_json(output: Output) -> None:
    stats = output.stats
    record: dict[str, Any] = {
        "text": output.text,
        "token_ids": output.token_ids,
        "nfe": stats.nfe,
        "positions_computed": stats.positions_computed,
        "steps": stats.steps,
        "accepted": stats.accepted,
        "seconds": round(stats.seconds, 6),
    }
    sys.stdout.write(json.dumps(record, ensure_ascii=False) + "\n")


def main() -> None:
    """Entry point of `spiffy-decode`."""
    run_app(app)


if __name__ == "__main__":
    main()
