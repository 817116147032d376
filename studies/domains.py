"""Compare ways of drafting on prompts like those calibrated on, and on others: `make results`.

Every tiny model is calibrated on generated problems, and decodes others of them and prompts of
another dataset: by a confidence chain, by the graph's nodes, by the acceptance model alone, and by
what `--budget N` takes, which leaves every forward to whichever of the three would have done best
lately. All are decoded for real, and every answer is compared with plain decoding. Counts are exact
and repeat; nothing is timed.

A chain is FreeDave's lossless drafting. With a block cache its own loop begins every block without
drafts and stores it in a forward of its own; ours does neither (docs/results-edges.md). Both are
counted.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from losslessness import OFF, ON, decode_all, fill, versions

from spiffy.calib.pipeline import build_graph, prepare, record
from spiffy.calib.prompts import PromptSet, load_prompts
from spiffy.runtime import BlockEdges, DiffusionLM, decoding_settings, load_model
from spiffy.runtime.draft import (
    BestOfDrafter,
    Drafter,
    GraphDrafter,
    confidence_chain,
    graph_drafter,
    way_of,
)
from spiffy.schemas import CacheName, DecodingSettings, DraftGraph, PolicyName

LAYOUTS: tuple[tuple[str, CacheName], ...] = (
    ("tiny-llada", "dual"),
    ("tiny-dream", "dual"),
    ("tiny-sdar", "block"),
)
POLICIES: tuple[PolicyName, ...] = ("static", "threshold")
OWN_EDGES = "chain, FreeDave's block edges"
WAYS = (OWN_EDGES, "chain", "graph", "model alone", "`--budget N`")


@dataclass(frozen=True)
class Count:
    """Forwards and positions of one way of decoding, over all prompts; answers that differ."""

    nfe: int
    positions: int
    differing: int = 0
    led: str = ""


@dataclass(frozen=True)
class Group:
    """One model, policy and dataset: plain decoding, and every way by (name, drafts)."""

    name: str
    dataset: str
    plain: Count
    ways: dict[tuple[str, int], Count]


def drafter_of(
    way: str, drafts: int, model: DiffusionLM, graph: DraftGraph, settings: DecodingSettings
) -> Drafter:
    """A fresh drafter: what one has learned is not the next one's."""
    if way in (OWN_EDGES, "chain"):
        return GraphDrafter(confidence_chain(drafts), model)
    if way == WAYS[-1]:
        return graph_drafter(model, graph, settings, drafts)
    return way_of(model, graph, settings, drafts, "graph" if way == "graph" else "model")


def group(
    model: DiffusionLM,
    settings: DecodingSettings,
    graph: DraftGraph,
    prompts: PromptSet,
    budgets: Sequence[int],
) -> Group:
    """Decode the prompts in every way."""
    texts = [str(text) for text in prompts.texts]
    plain = decode_all(model, settings, texts, None, ON)

    def count(drafter: Drafter | None, edges: BlockEdges) -> Count:
        outputs = plain if drafter is None else decode_all(model, settings, texts, drafter, edges)
        led = drafter.standing.leader if isinstance(drafter, BestOfDrafter) else 0
        return Count(
            sum(output.stats.nfe for output in outputs),
            sum(output.stats.positions_computed for output in outputs),
            sum(a.token_ids != b.token_ids for a, b in zip(outputs, plain, strict=True)),
            ("", " (graph)", " (chain)")[led],
        )

    ways = {}
    for drafts in budgets:
        for way in WAYS:
            if way == OWN_EDGES and settings.cache != "block":
                continue
            drafter = drafter_of(way, drafts, model, graph, settings)
            ways[way, drafts] = count(drafter, OFF if way == OWN_EDGES else ON)
    name = f"{model.name}, {settings.cache}, {settings.policy}"
    return Group(name, prompts.dataset, count(None, ON), ways)


def groups(args: argparse.Namespace) -> Iterator[Group]:
    """Everything there is to measure."""
    calibration = load_prompts("synthetic", args.calibrate)
    datasets = [
        load_prompts(name, args.samples, split="test") for name in ("synthetic", *args.dataset)
    ]
    for name, cache in LAYOUTS:
        model = load_model(name, device="cpu", dtype="float32")
        for policy in POLICIES:
            settings = decoding_settings(
                model, gen_length=args.gen_length, cache=cache, policy=policy
            )
            traces = record(model, prepare(model, calibration, settings))
            graph = build_graph(model, calibration, settings, traces, max(args.drafts))
            for prompts in datasets:
                yield group(model, settings, graph, prompts, args.drafts)


def lines(found: Group) -> Iterator[str]:
    """Markdown, one line per number of drafts."""
    plain = found.plain
    for drafts in dict.fromkeys(drafts for _, drafts in found.ways):
        counts = [found.ways.get((way, drafts)) for way in WAYS]
        ours, rivals = counts[-1], [c.nfe for c in counts[1:3] if c is not None]
        assert ours is not None
        cells = [
            "-" if c is None else f"{c.nfe} ({c.positions / plain.positions:.2f}x)" for c in counts
        ]
        differing = sum(c.differing for c in counts if c is not None)
        yield (
            f"| {found.name} | {found.dataset} | {drafts} | {plain.nfe} "
            f"| {' | '.join(cells)}{ours.led} | {ours.nfe / min(rivals) - 1:+.1%} | {differing} |"
        )


def main() -> None:
    """Print the table, or put it into Markdown files between its markers."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", nargs="*", default=["humaneval"], help="other prompts")
    parser.add_argument("--samples", type=int, default=20, help="prompts of each dataset")
    parser.add_argument("--calibrate", type=int, default=50, help="calibration problems")
    parser.add_argument("--drafts", type=int, nargs="+", default=[1, 3, 8, 32])
    parser.add_argument("--gen-length", type=int, default=64)
    parser.add_argument("--into", type=Path, nargs="*", default=[], help="Markdown files to fill")
    args = parser.parse_args()
    head = ["model, cache, policy", "prompts", "drafts", "plain", *WAYS]
    table = [
        f"| {' | '.join(head)} | against the better of chain and graph | answers that differ |",
        f"|{' --- |' * 3}{' ---: |' * (len(head) - 1)}",
    ]
    for found in groups(args):
        for line in lines(found):
            print(line, flush=True)
            table.append(line)
    names = " ".join(Path(name).name for name in args.dataset)
    command = f"python studies/domains.py --dataset {names} --samples {args.samples}"
    note = f"`{command} --calibrate {args.calibrate} --gen-length {args.gen_length}` ({versions()})"
    block = "\n".join([note, "", *table])
    for path in args.into:
        fill(path, "domains", block)


if __name__ == "__main__":
    main()
