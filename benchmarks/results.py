"""Measure what docs/results.md states: `make results`, about 15 minutes on 2 CPU cores.

Every tiny model is calibrated on generated problems and decodes others that neither training nor
calibration saw: plainly, with its draft graph at several budgets, and with the paper's objective.
Counts (NFE, positions, steps) and losslessness are exact and repeat; nothing here is timed.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from rich.progress import track

from spiffy.calib.pipeline import build_graph, prepare, record
from spiffy.calib.prompts import load_prompts
from spiffy.calib.synthetic import final_answer, problems
from spiffy.runtime import BlockEdges, DiffusionLM, decoding_settings, load_model
from spiffy.runtime.decode import run
from spiffy.runtime.draft import Drafter
from spiffy.runtime.generate import Output, collect, graph_drafter, make_task
from spiffy.schemas import CacheName, DecodingSettings, Objective, PolicyName

OFF = BlockEdges(complete=False, first=False, fold=False)
ON = BlockEdges()
POLICIES: tuple[PolicyName, ...] = ("static", "threshold")
BUDGETS = (1, 8, 32)


@dataclass(frozen=True)
class Row:
    """One way of decoding all test prompts, next to plain decoding without block edges."""

    model: str
    cache: str
    policy: str
    edges: str
    objective: str
    budget: int
    nfe: int
    positions: int
    steps: int
    differing: int
    exact: int


def decode_all(
    model: DiffusionLM,
    settings: DecodingSettings,
    questions: Sequence[str],
    drafter: Drafter | None,
    edges: BlockEdges,
) -> list[Output]:
    """Decode every question on its own."""
    outputs = []
    for sequence, question in enumerate(questions):
        task = make_task(model, question, settings, drafter, 0, sequence, edges)
        for _ in run(model, [task]):
            pass
        outputs.append(collect(task))
    return outputs


def measure(name: str, args: argparse.Namespace) -> Iterator[Row]:
    """All rows of one model, plain decoding first."""
    model = load_model(name, device="cpu", dtype="float32")
    unseen = list(islice(problems("test"), args.samples))
    questions = [problem.question for problem in unseen]
    answers = [final_answer(problem.answer) for problem in unseen]
    prompts = load_prompts("synthetic", args.calibrate)

    def row(
        settings: DecodingSettings, outputs: list[Output], plain: list[Output], **of: object
    ) -> Row:
        return Row(
            model=name,
            cache=settings.cache,
            policy=settings.policy,
            nfe=sum(output.stats.nfe for output in outputs),
            positions=sum(output.stats.positions_computed for output in outputs),
            steps=sum(output.stats.steps for output in outputs),
            differing=sum(
                ours.token_ids != theirs.token_ids
                for ours, theirs in zip(outputs, plain, strict=True)
            ),
            exact=sum(
                final_answer(output.text) == answer
                for output, answer in zip(outputs, answers, strict=True)
            ),
            **of,  # type: ignore[arg-type]
        )

    caches: tuple[CacheName, ...] = model.family.caches
    for cache in caches:
        for policy in POLICIES:
            settings = decoding_settings(
                model, gen_length=args.gen_length, cache=cache, policy=policy
            )
            traces = record(model, prepare(model, prompts, settings))
            plain = decode_all(model, settings, questions, None, OFF)
            yield row(settings, plain, plain, edges="off", objective="-", budget=0)
            if cache == "block":
                folded = decode_all(model, settings, questions, None, ON)
                yield row(settings, folded, plain, edges="on", objective="-", budget=0)
            # Only these layouts have something to gain at a block's edge.
            variants = [("off", OFF), ("on", ON)] if cache in ("none", "block") else [("off", OFF)]
            graphs: dict[Objective, list[tuple[str, BlockEdges]]] = {
                "expected-steps": variants,
                "paper": variants[-1:],
            }
            for objective, tried in graphs.items():
                graph = build_graph(model, prompts, settings, traces, 32, objective=objective)
                for budget in BUDGETS:
                    drafter = graph_drafter(model, graph, settings, budget)
                    for label, edges in tried:
                        outputs = decode_all(model, settings, questions, drafter, edges)
                        of = {"edges": label, "objective": objective, "budget": budget}
                        yield row(settings, outputs, plain, **of)


def table(rows: Sequence[Row], samples: int) -> str:
    """Markdown: one line per way of decoding, ratios against the plain line of its group."""
    lines = [
        "| model | cache | policy | block edges | graph | drafts | NFE | fewer | positions | ratio "
        "| steps per forward | prompts that differ | exact answers |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    plain = rows[0]
    for row in rows:
        if row.budget == 0 and row.edges == "off":
            plain = row
        lines.append(
            f"| {row.model} | {row.cache} | {row.policy} | {row.edges} | {row.objective} "
            f"| {row.budget} | {row.nfe} | {plain.nfe / row.nfe:.2f}x | {row.positions} "
            f"| {row.positions / plain.positions:.2f}x | {row.steps / row.nfe:.2f} "
            f"| {row.differing} of {samples} | {row.exact} of {samples} |"
        )
    return "\n".join(lines)


def losslessness(rows: Sequence[Row], samples: int) -> str:
    """Markdown: what was compared with plain decoding, and how many answers differed."""
    lines = [
        "| model | cache | policy | compared | answers that differ | claim |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for key in dict.fromkeys((row.model, row.cache, row.policy) for row in rows):
        group = [row for row in rows if (row.model, row.cache, row.policy) == key]
        compared = group[1:]  # the first is plain decoding itself
        total, differing = len(compared) * samples, sum(row.differing for row in compared)
        claim = "near-lossless" if key[1] == "prefix" else "exact"
        lines.append(
            f"| {' | '.join(key)} | {total} answers | {differing} ({differing / total:.1%}) "
            f"| {claim} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the tables, or put them into a Markdown file between its markers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["tiny-llada", "tiny-sdar"])
    parser.add_argument("--samples", type=int, default=12, help="test problems")
    parser.add_argument("--calibrate", type=int, default=30, help="calibration problems")
    parser.add_argument("--gen-length", type=int, default=64)
    parser.add_argument("--into", type=Path, nargs="*", default=[], help="Markdown files to fill")
    args = parser.parse_args()
    rows: list[Row] = []
    for name in args.models:
        rows += track(measure(name, args), description=name, total=None)
    versions = f"torch {torch.__version__}, Python {platform.python_version()}, float32, CPU"
    command = f"python benchmarks/results.py --models {' '.join(args.models)}"
    note = (
        f"`{command} --samples {args.samples} --calibrate {args.calibrate} --gen-length "
        f"{args.gen_length}` ({versions})"
    )
    blocks = {
        "results": f"{note}\n\n{table(rows, args.samples)}",
        "losslessness": f"{note}\n\n{losslessness(rows, args.samples)}",
    }
    for key, block in blocks.items():
        print(f"\n{block}")
        for path in args.into:
            fill(path, key, block)


def fill(path: Path, key: str, block: str) -> None:
    """Replace what stands between a file's markers for `key`, if it has them."""
    text = path.read_text(encoding="utf-8")
    start, end = f"<!-- {key} -->", f"<!-- /{key} -->"
    if start in text and end in text:
        head, tail = text.split(start)[0], text.split(end)[1]
        path.write_text(f"{head}{start}\n{block}\n{end}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
