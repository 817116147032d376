"""Measure what each block edge is worth (docs/results-edges.md): part of `make results`.

It takes 7 minutes on one CPU core.

Every switch of `BlockEdges` alone, all of them, and, where it says more, all but one, with a graph
calibrated for just that at the same block length. Counts are exact and repeat; nothing is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from losslessness import OFF, ON, POLICIES, decode_all, versions
from pages import add_into, at_least, command, expect, fill, start
from rich.progress import track

from spiffy.calib.pipeline import Traces, build_graph, prepare, record
from spiffy.calib.prompts import load_prompts
from spiffy.calib.synthetic import problems
from spiffy.runtime import BlockEdges, DiffusionLM, decoding_settings, load_model
from spiffy.runtime.draft import graph_drafter
from spiffy.runtime.generate import Output
from spiffy.schemas import CacheName, DecodingSettings, PolicyName

LAYOUTS: tuple[tuple[str, CacheName], ...] = (("tiny-sdar", "block"), ("tiny-llada", "none"))
BLOCK_LENGTHS = (4, 8, 32)
DRAFTS = 8
COMPLETE = BlockEdges(complete=True, first=False, fold=False)
FIRST = BlockEdges(complete=False, first=True, fold=False)
FOLD = BlockEdges(complete=False, first=False, fold=True)
#: What can make a difference: without drafts only folding, and only `BlockCache` folds.
PLAIN_EDGES = {"none": {"off": OFF}, "block": {"off": OFF, "fold": FOLD}}
DRAFT_EDGES = {
    "none": {"off": OFF, "complete": COMPLETE, "first": FIRST, "all": ON},
    "block": {
        "off": OFF,
        "complete": COMPLETE,
        "first": FIRST,
        "fold": FOLD,
        "complete, fold": BlockEdges(first=False),
        "all": ON,
    },
}


@dataclass(frozen=True)
class Row:
    """Totals of one way of decoding over all test prompts."""

    nfe: int
    positions: int
    differing: int


@dataclass(frozen=True)
class Group:
    """Every way of decoding one model with one block length and policy; "off" comes first."""

    model: str
    cache: str
    block_length: int
    policy: PolicyName
    plain: dict[str, Row]
    drafting: dict[str, Row]


def row(outputs: Sequence[Output], plain: Sequence[Output]) -> Row:
    """Add up the outputs of one way of decoding."""
    return Row(
        nfe=sum(output.stats.nfe for output in outputs),
        positions=sum(output.stats.positions_computed for output in outputs),
        differing=sum(
            ours.token_ids != theirs.token_ids for ours, theirs in zip(outputs, plain, strict=True)
        ),
    )


def measure(model: DiffusionLM, settings: DecodingSettings, args: argparse.Namespace) -> Group:
    """Decode the test problems with every setting of the switches that can matter."""
    prompts = load_prompts("synthetic", args.calibrate)
    questions = [problem.question for problem in islice(problems("test"), args.samples)]
    reference = decode_all(model, settings, questions, None, OFF)
    plain = {
        name: row(decode_all(model, settings, questions, None, edges), reference)
        for name, edges in PLAIN_EDGES[settings.cache].items()
    }
    traces: dict[tuple[bool, bool], Traces] = {}  # folding changes no draft
    drafting = {}
    for name, edges in DRAFT_EDGES[settings.cache].items():
        key = (edges.complete, edges.first)
        if key not in traces:
            traces[key] = record(model, prepare(model, prompts, settings, edges=edges))
        graph = build_graph(model, prompts, settings, traces[key], DRAFTS)
        drafter = graph_drafter(model, graph, settings, DRAFTS, selection="graph")
        outputs = decode_all(model, settings, questions, drafter, edges)
        drafting[name] = row(outputs, reference)
    return Group(
        model.name, settings.cache, settings.block_length, settings.policy, plain, drafting
    )


def groups(args: argparse.Namespace) -> Iterator[Group]:
    """Everything there is to measure."""
    for name, cache in LAYOUTS:
        model = load_model(name, device="cpu", dtype="float32")
        for block_length in BLOCK_LENGTHS:
            for policy in POLICIES:
                settings = decoding_settings(
                    model,
                    gen_length=args.gen_length,
                    cache=cache,
                    policy=policy,
                    block_length=block_length,
                )
                yield measure(model, settings, args)


def table(measured: Sequence[Group], samples: int) -> str:
    """Markdown: one line per way of decoding, changes against the same drafts without edges."""
    lines = [
        "| model | cache | block | policy | drafts | edges | NFE | change | positions | change "
        "| answers that differ |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for group in measured:
        for drafts, rows in ((0, group.plain), (DRAFTS, group.drafting)):
            off = rows["off"]
            for name, ours in rows.items():
                nfe, positions = ours.nfe / off.nfe - 1, ours.positions / off.positions - 1
                lines.append(
                    f"| {group.model} | {group.cache} | {group.block_length} | {group.policy} "
                    f"| {drafts} | {name} | {ours.nfe} | {nfe:+.1%} | {ours.positions} "
                    f"| {positions:+.1%} | {ours.differing} of {samples} |"
                )
    return "\n".join(lines)


def main() -> None:
    """Print the table, or put it into Markdown files between its markers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=at_least(1), default=8, help="test problems")
    parser.add_argument("--calibrate", type=at_least(1), default=20, help="calibration problems")
    parser.add_argument("--gen-length", type=at_least(1), default=64)
    add_into(parser)
    args = parser.parse_args()
    expect(parser, args.into, "edges")
    total = len(LAYOUTS) * len(BLOCK_LENGTHS) * len(POLICIES)
    measured = list(track(groups(args), description="block edges", total=total))
    note = f"`{command(args)}` (generated problems; against plain decoding; {versions()})"
    block = f"{note}\n\n{table(measured, args.samples)}"
    print(f"\n{block}")
    fill(args.into, "edges", block)


if __name__ == "__main__":
    start(main)
