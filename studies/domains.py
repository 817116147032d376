"""Compare ways of drafting on prompts like those calibrated on, and on others: `make results`.

Every tiny model is calibrated on generated problems, and decodes others of them and prompts of
another dataset: by a confidence chain, by the graph's nodes, by the acceptance model alone, and by
what `--budget N` takes, which leaves every forward to whichever of the three would have done best
lately. With the dual cache plain decodes are recorded and all ways replayed, exactly but for what
rejected drafts would say; with a block cache all is decoded for real, and every answer compared
with plain decoding. Counts repeat; nothing is timed.

A chain is FreeDave's lossless drafting. With a block cache its own loop begins every block without
drafts and stores it in a forward of its own; ours does neither (docs/results-edges.md). Both are
counted.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from losslessness import ON, decode_all, differing, enough, fitting, versions
from pages import add_into, at_least, command, expect, fill, start

from spiffy.calib.pipeline import Traces, build_graph, prepare, record
from spiffy.calib.prompts import PromptSet, load_prompts
from spiffy.calib.replay_drafts import replay_drafter
from spiffy.runtime import BlockEdges, DiffusionLM, decoding_settings, load_model
from spiffy.runtime.draft import (
    BestOfDrafter,
    Drafter,
    GraphDrafter,
    confidence_chain,
    graph_drafter,
    way_of,
)
from spiffy.runtime.forward.cache import NO_EDGES
from spiffy.runtime.generate import Output
from spiffy.schemas import CacheName, DecodingSettings, DraftGraph, PolicyName

LAYOUTS: tuple[tuple[str, CacheName], ...] = (
    ("tiny-llada", "dual"),
    ("tiny-dream", "dual"),
    ("tiny-sdar", "block"),
)
POLICIES: tuple[PolicyName, ...] = ("static", "threshold")
OWN_EDGES = "chain, FreeDave's block edges"
CHOSEN = "`--budget N`"
WAYS = (OWN_EDGES, "chain", "graph", "model alone", CHOSEN)


@dataclass(frozen=True)
class Count:
    """Forwards and positions of one way of decoding, over all prompts.

    Attributes
    ----------
    leader
        Who drafted at the end, if somebody chose.
    differing
        Answers that are not plain decoding's.
    """

    nfe: int
    positions: int
    leader: str = ""
    differing: int = 0


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
    if way == CHOSEN:
        return graph_drafter(model, graph, settings, drafts)
    return way_of(model, graph, settings, drafts, "graph" if way == "graph" else "model")


def decoded(
    model: DiffusionLM,
    settings: DecodingSettings,
    texts: Sequence[str],
    plain: Sequence[Output],
    drafter: Drafter,
    edges: BlockEdges,
) -> Count:
    """Decode for real, and compare the answers."""
    outputs = decode_all(model, settings, texts, drafter, edges)
    return Count(*totals(outputs), led(drafter), differing(outputs, plain))


def totals(outputs: Sequence[Output]) -> tuple[int, int]:
    """Forwards and positions."""
    return (
        sum(output.stats.nfe for output in outputs),
        sum(output.stats.positions_computed for output in outputs),
    )


def replayed(traces: Traces, block_length: int, drafter: Drafter) -> Count:
    """Replay plain decodes with the dual cache: there every forward that is saved ran a block."""
    found = replay_drafter(traces.prompts, drafter)
    blocks = found.drafts - (traces.nfe - found.forwards)
    return Count(found.forwards, traces.positions_computed + block_length * blocks, led(drafter))


def led(drafter: Drafter) -> str:
    """Who drafts now, if somebody chooses."""
    if not isinstance(drafter, BestOfDrafter):
        return ""
    return ("model", "graph", "chain")[drafter.standing.leader]


def group(
    model: DiffusionLM,
    settings: DecodingSettings,
    graph: DraftGraph,
    prompts: PromptSet,
    budgets: Sequence[int],
) -> Group:
    """Count the forwards of every way."""
    ways: dict[tuple[str, int], Count] = {}
    if settings.cache == "dual":
        traces = record(model, prepare(model, prompts, settings))
        plain = Count(traces.nfe, traces.positions_computed)
        for drafts, way in product(budgets, WAYS[1:]):
            drafter = drafter_of(way, drafts, model, graph, settings)
            ways[way, drafts] = replayed(traces, settings.block_length, drafter)
    else:
        texts = [str(text) for text in prompts.texts]
        outputs = decode_all(model, settings, texts, None, ON)
        plain = Count(*totals(outputs))
        for drafts, way in product(budgets, WAYS):
            drafter = drafter_of(way, drafts, model, graph, settings)
            edges = NO_EDGES if way == OWN_EDGES else ON
            ways[way, drafts] = decoded(model, settings, texts, outputs, drafter, edges)
    name = f"{model.name}, {settings.cache}, {settings.policy}"
    return Group(name, prompts.dataset, plain, ways)


def groups(args: argparse.Namespace) -> Iterator[Group]:
    """Everything there is to measure."""
    calibration = load_prompts("synthetic", args.calibrate)
    for name, cache in LAYOUTS:
        model = load_model(name, device="cpu", dtype="float32")
        for policy in POLICIES:
            settings = decoding_settings(
                model, gen_length=args.gen_length, cache=cache, policy=policy
            )
            traces = record(model, prepare(model, calibration, settings))
            graph = build_graph(model, calibration, settings, traces, max(args.drafts))
            enough(graph, max(args.drafts))
            for dataset in ("synthetic", *args.dataset):
                prompts = fitting(dataset, args.samples, model, settings)
                yield group(model, settings, graph, prompts, args.drafts)


def lines(found: Group) -> Iterator[str]:
    """Markdown, one line per number of drafts."""
    for drafts in dict.fromkeys(drafts for _, drafts in found.ways):
        counts = {way: found.ways[way, drafts] for way in WAYS if (way, drafts) in found.ways}
        cells = [
            f"{counts[way].nfe} ({counts[way].positions / found.plain.positions:.2f}x)"
            if way in counts
            else "-"
            for way in WAYS
        ]
        ours, rival = counts[CHOSEN], min(counts["chain"].nfe, counts["graph"].nfe)
        yield (
            f"| {found.name} | {found.dataset} | {drafts} | {found.plain.nfe} "
            f"| {' | '.join(cells)} | {ours.leader} | {ours.nfe / rival - 1:+.1%} |"
        )


def main() -> None:
    """Print the table, or put it into Markdown files between its markers."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", nargs="*", default=["humaneval"], help="other prompts")
    parser.add_argument("--samples", type=at_least(1), default=40, help="prompts of each dataset")
    parser.add_argument("--calibrate", type=at_least(1), default=50, help="calibration problems")
    parser.add_argument("--drafts", type=at_least(1), nargs="+", default=[1, 3, 8, 32])
    parser.add_argument("--gen-length", type=at_least(1), default=64)
    add_into(parser)
    args = parser.parse_args()
    expect(parser, args.into, "domains")
    head = ["model, cache, policy", "prompts", "drafts", "plain NFE", *WAYS, "at the end by"]
    table = [
        f"| {' | '.join(head)} | against the better of chain and graph |",
        f"| --- | --- |{' ---: |' * (3 + len(WAYS) - 1)} --- | ---: |",
    ]
    wrong = 0
    for found in groups(args):
        wrong += sum(count.differing for count in found.ways.values())
        for line in lines(found):
            print(line, flush=True)
            table.append(line)
    note = (
        f"`{command(args)}` ({args.samples} prompts of each; {versions()}; answers that "
        f"differ from plain decoding's: {wrong})"
    )
    block = "\n".join([note, "", *table])
    print(f"\n{block}")
    fill(args.into, "domains", block)


if __name__ == "__main__":
    start(main)
