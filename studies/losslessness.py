"""Compare drafting with plain decoding, answer by answer (docs/losslessness.md): `make results`.

Every tiny model is calibrated on generated problems and decodes others that neither training nor
calibration saw: plainly, with drafts chosen at run time at several budgets, with the static draft
graph, and with the paper's; with every exact cache, and with and without block edges.

A second table is of the one cache that is not exact, beside the exact one that freezes the same:
how many answers its drafts change, and what it saves for that. Whole answers are compared, not cut
at their end; with `--dataset` also those to other prompts.

A third table is of company: the same answers decoded alone, and together with fifteen others, whose
rows a forward then pads and multiplies in one go, in float32 and in bfloat16.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
from pages import add_into, expect, fill
from rich.progress import track

from spiffy.calib.pipeline import build_graph, prepare, record
from spiffy.calib.prompts import PromptSet, load_prompts
from spiffy.calib.synthetic import problems
from spiffy.runtime import BlockEdges, DiffusionLM, decoding_settings, load_model
from spiffy.runtime.decode import Task, make_task, run
from spiffy.runtime.draft import Drafter, graph_drafter
from spiffy.runtime.generate import Output, Selection, answer_ids, collect
from spiffy.schemas import CacheName, DecodingSettings, DraftGraph, PolicyName, SpiffyError

OFF = BlockEdges(complete=False, first=False, fold=False)
ON = BlockEdges()
EDGES = {"off": OFF, "on": ON}
POLICIES: tuple[PolicyName, ...] = ("static", "threshold")
BUDGETS = (1, 8, 32)
PREFIX_CACHES: tuple[CacheName, ...] = ("prefix", "prefix-shared")
SHARING = 8  # drafts of the second table
TOGETHER = 16  # sequences that share a forward, of the third table
DRAFTED = 8  # drafts of each of them, beside none
DTYPES = ("float32", "bfloat16")


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
        Answers that are not plain decoding's, of all that were compared.
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


def fitting(
    dataset: str, samples: int, model: DiffusionLM, settings: DecodingSettings
) -> PromptSet:
    """Test prompts of a data set that the model has room for; the name says how many are left."""
    drawn = load_prompts(dataset, samples, split="test")
    kept = []
    for text in drawn.texts:
        try:
            make_task(model, text, settings)
        except SpiffyError:
            continue
        kept.append(text)
    name = drawn.dataset
    if len(kept) < len(drawn.texts):
        name = f"{name} ({len(kept)} of {len(drawn.texts)})"
    return PromptSet(name, tuple(kept))


def measure(name: str, args: argparse.Namespace) -> Iterator[Row]:
    """All rows of one model, of each setting plain decoding first."""
    model = load_model(name, device="cpu", dtype="float32")
    questions = [problem.question for problem in islice(problems("test"), args.samples)]
    prompts = load_prompts("synthetic", args.calibrate)

    def row(
        settings: DecodingSettings, outputs: list[Output], plain: list[Output], **of: object
    ) -> Row:
        return Row(
            model=name,
            cache=settings.cache,
            policy=settings.policy,
            differing=differing(outputs, plain),
            compared=len(outputs),
            **of,  # type: ignore[arg-type]
        )

    for cache in args.caches or model.family.caches:
        for policy in POLICIES:
            settings = decoding_settings(
                model, gen_length=args.gen_length, cache=cache, policy=policy
            )
            if not settings.exact:
                continue
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
            for way, (graph, selection, tried) in ways.items():
                for budget in BUDGETS:
                    drafter = graph_drafter(model, graph, settings, budget, selection)
                    for label in tried:
                        edges = EDGES.get(label, ON)
                        outputs = decode_all(model, settings, questions, drafter, edges)
                        of = {"edges": label, "drafts_by": way, "budget": budget}
                        yield row(settings, outputs, plain, **of)


def differing(outputs: Sequence[Output], plain: Sequence[Output]) -> int:
    """How many answers are not plain decoding's."""
    return sum(
        ours.token_ids != theirs.token_ids for ours, theirs in zip(outputs, plain, strict=True)
    )


@dataclass(frozen=True)
class Sharing:
    """The prefix caches beside each other, on the same prompts and with the same graph.

    Attributes
    ----------
    differing
        Answers that are not plain decoding's, by cache.
    nfe, positions
        Forwards and positions computed, by cache; "plain" is the same with both.
    """

    model: str
    policy: PolicyName
    prompts: str
    compared: int
    differing: Mapping[str, int]
    nfe: Mapping[str, int]
    positions: Mapping[str, int]


def share(name: str, args: argparse.Namespace) -> Iterator[Sharing]:
    """Decode with and without a suffix shared by all drafts."""
    model = load_model(name, device="cpu", dtype="float32")
    if not set(PREFIX_CACHES) <= set(model.family.caches):
        return
    prompts = load_prompts("synthetic", args.calibrate)
    generated = load_prompts("synthetic", args.near_samples, split="test")
    tried = [("generated", generated.texts, args.gen_length)]
    if args.dataset:
        drawn = load_prompts(args.dataset, args.dataset_samples, split="test")
        tried.append((drawn.dataset, drawn.texts, args.dataset_gen_length))
    for policy in POLICIES:
        base = decoding_settings(
            model, gen_length=args.gen_length, cache="prefix", policy=policy, stop_at_eos=False
        )
        traces = record(model, prepare(model, prompts, base))
        graph = build_graph(model, prompts, base, traces, SHARING)
        for label, questions, gen_length in tried:
            settings = base.model_copy(update={"gen_length": gen_length})
            drafter = graph_drafter(model, graph, settings, SHARING)
            found = {"plain": decode_all(model, settings, questions, None, ON)}
            for cache in PREFIX_CACHES:
                ours = settings.model_copy(update={"cache": cache})
                found[cache] = decode_all(model, ours, questions, drafter, ON)
            yield Sharing(
                name,
                policy,
                f"{label}, {gen_length} tokens",
                len(questions),
                {cache: differing(outputs, found["plain"]) for cache, outputs in found.items()},
                {cache: sum(out.stats.nfe for out in found[cache]) for cache in found},
                {
                    cache: sum(out.stats.positions_computed for out in found[cache])
                    for cache in found
                },
            )


def sharing(rows: Sequence[Sharing]) -> str:
    """Markdown: what a shared suffix changes and saves, beside the exact layout."""
    ways = ("plain", *PREFIX_CACHES)
    lines = [
        "| model | policy | prompts | answers changed: prefix | prefix-shared "
        f"| NFE {', '.join(ways)} | positions {', '.join(ways)} | positions saved by sharing |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        changed = [f"{row.differing[cache]} of {row.compared}" for cache in PREFIX_CACHES]
        saved = 1 - row.positions["prefix-shared"] / row.positions["prefix"]
        lines.append(
            f"| {row.model} | {row.policy} | {row.prompts} | {' | '.join(changed)} "
            f"| {', '.join(str(row.nfe[way]) for way in ways)} "
            f"| {', '.join(str(row.positions[way]) for way in ways)} | {saved:.0%} |"
        )
    total = sum(row.compared for row in rows)
    wrong = [sum(row.differing[cache] for row in rows) for cache in PREFIX_CACHES]
    rates = " | ".join(f"{count} of {total} ({count / total:.1%})" for count in wrong)
    nfe = ", ".join(str(sum(row.nfe[way] for row in rows)) for way in ways)
    sums = {way: sum(row.positions[way] for row in rows) for way in ways}
    saved = 1 - sums["prefix-shared"] / sums["prefix"]
    lines.append(
        f"| all | | | {rates} | {nfe} | {', '.join(map(str, sums.values()))} | {saved:.0%} |"
    )
    return "\n".join(lines)


@dataclass(frozen=True)
class Company:
    """Answers decoded together beside the same ones decoded plainly, each alone.

    Attributes
    ----------
    differing
        Answers that are not plain decoding's, by way: plain, or with drafts.
    parted
        Decodes that pass through another state than plain decoding: near-ties, after which the
        answer may yet be the same.
    steps
        Denoising steps that were compared: of a decode that parts, up to where it does.
    """

    model: str
    cache: str
    policy: PolicyName
    dtype: str
    compared: int
    differing: Mapping[str, int]
    parted: Mapping[str, int]
    steps: Mapping[str, int]


def keep_company(name: str, args: argparse.Namespace) -> Iterator[Company]:
    """Decode alone and together, of every exact cache that is no variant of another."""
    prompts = load_prompts("synthetic", args.calibrate)
    questions = [problem.question for problem in islice(problems("test"), args.company_samples)]
    models = {dtype: load_model(name, device="cpu", dtype=dtype) for dtype in DTYPES}
    first = models[DTYPES[0]]
    for cache in args.caches or [c for c in first.family.caches if c in ("none", "dual", "block")]:
        for policy in POLICIES:
            settings = decoding_settings(
                first, gen_length=args.gen_length, cache=cache, policy=policy
            )
            traces = record(first, prepare(first, prompts, settings))
            graph = build_graph(first, prompts, settings, traces, DRAFTED)
            for dtype, model in models.items():
                drafter = graph_drafter(model, graph, settings, DRAFTED)
                alone = decoded_tasks(model, settings, questions, None, 1)
                wrong, parted, steps = {}, {}, {}
                for way, used in (("plain", None), (f"{DRAFTED} drafts", drafter)):
                    together = decoded_tasks(model, settings, questions, used, TOGETHER)
                    pairs = [*zip(alone, together, strict=True)]
                    at = [parting(one, other) for one, other in pairs]
                    wrong[way] = sum(answer_ids(one) != answer_ids(other) for one, other in pairs)
                    parted[way] = sum(step is not None for step in at)
                    steps[way] = sum(
                        len(task.path) if step is None else step + 1
                        for task, step in zip(alone, at, strict=True)
                    )
                yield Company(name, cache, policy, dtype, len(questions), wrong, parted, steps)


def decoded_tasks(
    model: DiffusionLM,
    settings: DecodingSettings,
    questions: Sequence[str],
    drafter: Drafter | None,
    batch_size: int,
) -> list[Task]:
    """Decode every question, so many at a time."""
    tasks = [
        make_task(model, question, settings, drafter, 0, sequence)
        for sequence, question in enumerate(questions)
    ]
    for _ in run(model, tasks, batch_size):
        pass
    return tasks


def parting(ours: Task, theirs: Task) -> int | None:
    """The first denoising step that two decodes do not share; None if they share all."""
    states = zip(ours.path, theirs.path, strict=False)
    return next((k for k, (a, b) in enumerate(states) if not torch.equal(a.ids, b.ids)), None)


def company(rows: Sequence[Company]) -> str:
    """Markdown: how often company changes an answer, and how rare near-ties are."""
    ways = list(rows[0].differing)
    heads = "".join(f" {way}: answers that differ | one near-tie in steps |" for way in ways)
    lines = [
        f"| model | cache | policy | dtype |{heads}",
        "| --- | --- | --- | --- |" + " ---: | ---: |" * len(ways),
    ]

    def cells(some: Sequence[Company]) -> str:
        found = []
        for way in ways:
            wrong, total = sum(r.differing[way] for r in some), sum(r.compared for r in some)
            parted, steps = sum(r.parted[way] for r in some), sum(r.steps[way] for r in some)
            often = f"{steps / parted:.0f}" if parted else f"none in {steps}"
            found.append(f"{wrong} of {total} ({wrong / total:.1%}) | {often}")
        return " | ".join(found)

    for row in rows:
        lines.append(f"| {row.model} | {row.cache} | {row.policy} | {row.dtype} | {cells([row])} |")
    for dtype in DTYPES:
        lines.append(f"| all | | | {dtype} | {cells([r for r in rows if r.dtype == dtype])} |")
    return "\n".join(lines)


def losslessness(rows: Sequence[Row]) -> str:
    """Markdown: what was compared with plain decoding, and how many answers differed."""
    heads = ["no drafts", *(f"{budget} draft{'s' * (budget > 1)}" for budget in BUDGETS)]
    lines = [
        f"| model | cache | policy | edges | {' | '.join(heads)} | answers that differ |",
        "| --- | --- | --- | --- |" + " --- |" * (len(heads) + 1),
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
            cells.append(f"{wrong} of {total} ({wrong / total:.1%})")
            lines.append(f"| {' | '.join((*setting, edges, *cells))} |")
    return "\n".join(lines)


def main() -> None:
    """Print the tables, or put them into a Markdown file between its markers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--models", nargs="+", default=["tiny-llada", "tiny-dream", "tiny-sdar", "tiny-llada2"]
    )
    parser.add_argument("--samples", type=int, default=12, help="test problems")
    parser.add_argument("--caches", nargs="*", help="of the first table; default: all exact ones")
    parser.add_argument("--calibrate", type=int, default=30, help="calibration problems")
    parser.add_argument("--gen-length", type=int, default=64)
    parser.add_argument(
        "--tables",
        nargs="+",
        choices=("losslessness", "sharing", "company"),
        default=["losslessness", "sharing", "company"],
    )
    parser.add_argument(
        "--near-samples", type=int, default=20, help="test problems of the second table"
    )
    parser.add_argument(
        "--company-samples", type=int, default=64, help="test problems of the third table"
    )
    parser.add_argument("--dataset", help="name or JSONL file of more prompts for it")
    parser.add_argument("--dataset-samples", type=int, default=10, help="how many of those")
    parser.add_argument("--dataset-gen-length", type=int, default=128)
    add_into(parser)
    args = parser.parse_args()
    expect(parser, args.into, *args.tables)
    command = "python studies/losslessness.py --models"
    size = f"--calibrate {args.calibrate} --gen-length {args.gen_length}"
    blocks: dict[str, str] = {}
    if "losslessness" in args.tables:
        rows = measured(measure, args.models, args)
        chosen = f" --caches {' '.join(args.caches)}" if args.caches else ""
        blocks["losslessness"] = (
            f"`{command} {' '.join(args.models)} --tables losslessness{chosen} --samples "
            f"{args.samples} {size}` ({versions()})\n\n{losslessness(rows)}"
        )
    if "sharing" in args.tables:
        beside = measured(share, args.models, args)
        models = dict.fromkeys(row.model for row in beside)
        more = ""
        if args.dataset:
            more = (
                f" --dataset {Path(args.dataset).name} --dataset-samples {args.dataset_samples} "
                f"--dataset-gen-length {args.dataset_gen_length}"
            )
        blocks["sharing"] = (
            f"`{command} {' '.join(models)} --tables sharing --near-samples {args.near_samples} "
            f"{size}{more}` ({versions()})\n\n{sharing(beside)}"
        )
    if "company" in args.tables:
        kept = measured(keep_company, args.models, args)
        blocks["company"] = (
            f"`{command} {' '.join(args.models)} --tables company --company-samples "
            f"{args.company_samples} {size}` ({versions().replace('float32, ', '')})\n\n"
            f"{company(kept)}"
        )
    for key, block in blocks.items():
        print(f"\n{block}")
        fill(args.into, key, block)


Line = TypeVar("Line")


def measured(
    of: Callable[[str, argparse.Namespace], Iterator[Line]],
    models: Sequence[str],
    args: argparse.Namespace,
) -> list[Line]:
    """All lines of a table, model by model."""
    return [line for name in models for line in track(of(name, args), description=name, total=None)]


def versions() -> str:
    """What the counts depend on besides the command."""
    return f"torch {torch.__version__}, Python {platform.python_version()}, float32, CPU"


if __name__ == "__main__":
    main()
