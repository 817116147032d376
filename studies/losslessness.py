"""Compare drafting with plain decoding, answer by answer (docs/losslessness.md): `make results`.

Every tiny model is calibrated on generated problems and decodes others that neither training nor
calibration saw: plainly, with drafts chosen at run time at several budgets, with the static draft
graph, and with the paper's; with every cache, and with and without block edges.
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
from spiffy.calib.synthetic import problems
from spiffy.runtime import BlockEdges, DiffusionLM, decoding_settings, load_model
from spiffy.runtime.decode import make_task, run
from spiffy.runtime.draft import Drafter, graph_drafter
from spiffy.runtime.generate import Output, Selection, collect
from spiffy.schemas import CacheName, DecodingSettings, DraftGraph, PolicyName

OFF = BlockEdges(complete=False, first=False, fold=False)
ON = BlockEdges()
EDGES = {"off": OFF, "on": ON}
POLICIES: tuple[PolicyName, ...] = ("static", "threshold")
BUDGETS = (1, 8, 32)


@dataclass(frozen=True)
class Row:
    """One way of decoding the test prompts, next to plain decoding without block edges.

    Attributes
    ----------
    edges
        "off" or "on"; "-" where the cache has nothing to gain at a block's edge.
    drafts_by
        "model": the artifact's acceptance model chooses at run time; "graph": its nodes in order;
        "paper": nodes by the paper's objective; "-" without drafts.
    differing, compared
        Answers that are not plain decoding's, of all that were compared: more than the rest
        counts where the layout is only near-lossless, because there the rate is the point.
    """

    model: str
    cache: str
    policy: PolicyName
    edges: str
    drafts_by: str
    budget: int
    differing: int
    compared: int

    @property
    def setting(self) -> tuple[str, str, str]:
        """What has one plain decoding to be compared with."""
        return self.model, self.cache, self.policy


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
    """All rows of one model, of each setting plain decoding first."""
    model = load_model(name, device="cpu", dtype="float32")
    unseen = list(islice(problems("test"), max(args.samples, args.near_samples)))
    prompts = load_prompts("synthetic", args.calibrate)

    def row(
        settings: DecodingSettings, outputs: list[Output], plain: list[Output], **of: object
    ) -> Row:
        return Row(
            model=name,
            cache=settings.cache,
            policy=settings.policy,
            differing=sum(
                ours.token_ids != theirs.token_ids
                for ours, theirs in zip(outputs, plain, strict=True)
            ),
            compared=len(outputs),
            **of,  # type: ignore[arg-type]
        )

    caches: tuple[CacheName, ...] = model.family.caches
    for cache in caches:
        for policy in POLICIES:
            settings = decoding_settings(
                model, gen_length=args.gen_length, cache=cache, policy=policy
            )
            samples = args.samples if settings.exact else len(unseen)
            questions = [problem.question for problem in unseen[:samples]]
            traces = record(model, prepare(model, prompts, settings))
            plain = decode_all(model, settings, questions, None, OFF)
            labels = ["off", "on"] if cache in ("none", "block") else ["-"]
            yield row(settings, plain, plain, edges=labels[0], drafts_by="-", budget=0)
            if cache == "block":
                folded = decode_all(model, settings, questions, None, ON)
                yield row(settings, folded, plain, edges="on", drafts_by="-", budget=0)
            ours = build_graph(model, prompts, settings, traces, 32)
            paper = build_graph(model, prompts, settings, traces, 32, objective="paper")
            ways: dict[str, tuple[DraftGraph, Selection, list[str]]] = {
                "model": (ours, "model", labels),
                "graph": (ours, "graph", labels[-1:]),
                "paper": (paper, "graph", labels[-1:]),
            }
            if not settings.exact:  # many prompts, and the rate is what matters
                ways = {"model": ways["model"]}
            for way, (graph, selection, tried) in ways.items():
                for budget in BUDGETS:
                    drafter = graph_drafter(model, graph, settings, budget, selection)
                    for label in tried:
                        edges = EDGES.get(label, ON)
                        outputs = decode_all(model, settings, questions, drafter, edges)
                        of = {"edges": label, "drafts_by": way, "budget": budget}
                        yield row(settings, outputs, plain, **of)


def losslessness(rows: Sequence[Row]) -> str:
    """Markdown: what was compared with plain decoding, and how many answers differed."""
    heads = ["no drafts", *(f"{budget} draft{'s' * (budget > 1)}" for budget in BUDGETS)]
    lines = [
        f"| model | cache | policy | edges | {' | '.join(heads)} | answers that differ | claim |",
        "| --- | --- | --- | --- |" + " --- |" * (len(heads) + 2),
    ]
    for setting in dict.fromkeys(row.setting for row in rows):
        reference, *compared = (row for row in rows if row.setting == setting)
        for edges in dict.fromkeys((reference.edges, *(row.edges for row in compared))):
            ours = [row for row in compared if row.edges == edges]
            cells = []
            for budget in (0, *BUDGETS):
                some = [row for row in ours if row.budget == budget]
                wrong, total = sum(r.differing for r in some), sum(r.compared for r in some)
                cells.append(f"{wrong} of {total}" if some else "-")
            wrong, total = sum(r.differing for r in ours), sum(r.compared for r in ours)
            claim = "near-lossless" if setting[1] == "prefix" else "exact"
            lines.append(
                f"| {' | '.join((*setting, edges, *cells))} "
                f"| {wrong} of {total} ({wrong / total:.1%}) | {claim} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Print the tables, or put them into a Markdown file between its markers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["tiny-llada", "tiny-dream", "tiny-sdar"])
    parser.add_argument("--samples", type=int, default=12, help="test problems")
    parser.add_argument(
        "--near-samples", type=int, default=40, help="test problems compared with cache prefix"
    )
    parser.add_argument("--calibrate", type=int, default=30, help="calibration problems")
    parser.add_argument("--gen-length", type=int, default=64)
    parser.add_argument("--into", type=Path, nargs="*", default=[], help="Markdown files to fill")
    args = parser.parse_args()
    rows: list[Row] = []
    for name in args.models:
        rows += track(measure(name, args), description=name, total=None)
    command = f"python studies/losslessness.py --models {' '.join(args.models)}"
    note = (
        f"`{command} --samples {args.samples} --near-samples {args.near_samples} --calibrate "
        f"{args.calibrate} --gen-length {args.gen_length}` ({versions()})"
    )
    block = f"{note}\n\n{losslessness(rows)}"
    print(f"\n{block}")
    for path in args.into:
        fill(path, "losslessness", block)


def versions() -> str:
    """What the counts depend on besides the command."""
    return f"torch {torch.__version__}, Python {platform.python_version()}, float32, CPU"


def fill(path: Path, key: str, block: str) -> None:
    """Replace what stands between a file's markers for `key`, if it has them."""
    text = path.read_text(encoding="utf-8")
    start, end = f"<!-- {key} -->", f"<!-- /{key} -->"
    if start in text and end in text:
        head, tail = text.split(start)[0], text.split(end)[1]
        path.write_text(f"{head}{start}\n{block}\n{end}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
