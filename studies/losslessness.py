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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, get_args

import torch
from pages import add_into, at_least, command, expect, fill, machine, start, whole
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
MODELS = ("tiny-llada", "tiny-dream", "tiny-sdar", "tiny-llada2")
CACHES: tuple[CacheName, ...] = get_args(CacheName)
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
    """Test prompts of a data set that the model has room for; the name says how many are left.

    Raises
    ------
    SystemExit
        If none is.
    """
    drawn = load_prompts(dataset, samples, split="test")
    kept = []
    for text in dict.fromkeys(drawn.texts):  # calibration leaves out those that repeat others, too
        try:
            make_task(model, text, settings)
        except SpiffyError:
            continue
        kept.append(text)
    if not kept:
        raise SystemExit(f"{model.name} has room for none of the prompts of {dataset}: draw more")
    name = drawn.dataset
    if len(kept) < len(drawn.texts):
        name = f"{name} ({len(kept)} of {len(drawn.texts)})"
    return PromptSet(name, tuple(kept))


def enough(graph: DraftGraph, drafts: int) -> None:
    """See that a graph has as many nodes as drafts are asked for.

    Raises
    ------
    SystemExit
        If it has not.
    """
    if len(graph.nodes) < drafts:
        raise SystemExit(f"a graph of {len(graph.nodes)} nodes, not {drafts}: more --calibrate")


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

    for cache in model.family.caches:
        if args.caches and cache not in args.caches:
            continue
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
        longest = decoding_settings(model, gen_length=args.dataset_gen_length, cache="prefix")
        drawn = fitting(args.dataset, args.dataset_samples, model, longest)
        tried.append((drawn.dataset, drawn.texts, args.dataset_gen_length))
    for policy in POLICIES:
        base = decoding_settings(
            model, gen_length=args.gen_length, cache="prefix", policy=policy, stop_at_eos=False
        )
        traces = record(model, prepare(model, prompts, base))
        graph = build_graph(model, prompts, base, traces, SHARING)
        for label, questions, gen_length in tried:
            settings = base.model_copy(update={"gen_length": gen_length})
            found = {"plain": decode_all(model, settings, questions, None, ON)}
            for cache in PREFIX_CACHES:
                drafter = graph_drafter(model, graph, settings, SHARING)  # has learned nothing yet
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
    for cache in [c for c in first.family.caches if c in ("none", "dual", "block")]:
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
    given, several = parser.add_argument, {"nargs": "+"}
    given("--models", **several, choices=MODELS, default=[*MODELS])
    given("--samples", type=at_least(1), default=12, help="test problems")
    given("--caches", **several, choices=CACHES, help="of the first table; default: all exact ones")
    given("--calibrate", type=at_least(1), default=30, help="calibration problems")
    given("--gen-length", type=at_least(1), default=64)
    given("--tables", **several, choices=TABLES, default=[*TABLES])
    given("--near-samples", type=at_least(1), default=20, help="test problems of the second table")
    given("--company-samples", type=at_least(1), default=64, help="test problems of the third one")
    given("--dataset", help="name or JSONL file of more prompts for the second table")
    given("--dataset-samples", type=at_least(1), default=10, help="how many of those")
    given("--dataset-gen-length", type=at_least(1), default=128)
    add_into(parser)
    args = parser.parse_args()
    whole(parser, args, "models", "caches")
    expect(parser, args.into, *args.tables)
    for key in dict.fromkeys(args.tables):  # each is kept once it is done
        of, table = TABLES[key]
        rows = measured(of, args.models, args)
        if not rows:
            print(f"\n{key}: nothing of {', '.join(args.models)} belongs there")
            continue
        block = f"`{command(_of(key, args))}` ({machine()}{SAID[key]})\n\n{table(rows)}"
        print(f"\n{block}", flush=True)
        fill(args.into, key, block)


Measure = Callable[[str, argparse.Namespace], Iterator[Any]]
TABLES: dict[str, tuple[Measure, Callable[[Sequence[Any]], str]]] = {
    "losslessness": (measure, losslessness),
    "sharing": (share, sharing),
    "company": (keep_company, company),
}
SAID = {
    "losslessness": ", float32; generated problems; against plain decoding without block edges",
    "sharing": ", float32; against plain decoding",
    "company": "; generated problems; against plain decoding alone",
}
#: Options that a table does not depend on.
OTHERS = {
    "losslessness": {"near_samples", "company_samples"},
    "sharing": {"samples", "caches", "company_samples"},
    "company": {"samples", "caches", "near_samples"},
}


def _of(table: str, args: argparse.Namespace) -> argparse.Namespace:
    """What one table is made of."""
    given = {**vars(args), "tables": [table]}
    without = OTHERS[table]
    if table != "sharing" or not args.dataset:
        without = without | {"dataset", "dataset_samples", "dataset_gen_length"}
    return argparse.Namespace(**{name: given[name] for name in given if name not in without})


def measured(of: Measure, models: Sequence[str], args: argparse.Namespace) -> list[Any]:
    """All lines of a table, model by model."""
    return [line for name in models for line in track(of(name, args), description=name, total=None)]


def versions() -> str:
    """What the counts depend on besides the command."""
    return f"{machine()}, float32"


if __name__ == "__main__":
    start(main)
