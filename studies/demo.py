"""The first minute: four trained tiny models with and without drafts, then a real model's size.

    make demo

Calibrates every model on generated problems, decodes others that neither training nor calibration
saw, plainly and with `auto`, prompt by prompt, and compares the tokens. The last line grows the
tiny model into the shape of Qwen3-0.6B (`spiffy.bench.grow`): same tokens, and forwards that cost
what that model's cost; in bfloat16 where the processor multiplies it (AMX, AVX-512).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

from spiffy.cli.common import console, hush, log, progress_bar
from spiffy.cli.threads import set_threads, wait_passively

wait_passively()  # before torch is imported
hush()

# ruff: noqa: E402
from fresh import forgetting_costs
from pages import at_least, start
from rich.table import Table

from spiffy.bench.grow import grow, grow_graph
from spiffy.calib.pipeline import build_graph, prepare, record
from spiffy.calib.prompts import load_prompts
from spiffy.runtime import DiffusionLM, decoding_settings, generate, load_model
from spiffy.runtime.budget.cost import multiplies_bfloat16
from spiffy.runtime.models.prepack import prepack_if_faster
from spiffy.schemas import CacheName, DraftGraph

CASES: tuple[tuple[str, CacheName], ...] = (
    ("tiny-sdar", "block"),
    ("tiny-llada", "dual"),
    ("tiny-dream", "dual"),
    ("tiny-llada2", "block"),
)
SHAPE = "qwen3-0.6b"
DRAFTS = 8  # of the count that says what a device that waits for memory would gain
SLOW = 100.0  # seconds: beyond, one prompt at a real size is enough


@dataclass(frozen=True)
class Line:
    """What became of one model.

    Attributes
    ----------
    nfe
        Forwards plain, with `auto`, and with 8 drafts (0: not counted).
    positions
        Token positions computed with `auto`, over plain decoding's.
    speeds
        Tokens per second, plain and with `auto`: of each the median over prompts.
    ratio
        How many times as fast `auto` is: the median prompt.
    """

    name: str
    cache: str
    identical: bool
    nfe: tuple[int, int, int]
    positions: float
    speeds: tuple[float, float]
    ratio: float


def calibrated(model: DiffusionLM, cache: CacheName, prompts: int) -> DraftGraph:
    """A draft graph of up to 32 nodes."""
    settings = decoding_settings(model, gen_length=64, cache=cache)
    drawn = load_prompts("synthetic", prompts)
    set_threads(model, settings, None)
    return build_graph(model, drawn, settings, record(model, prepare(model, drawn, settings)), 32)


def race(
    name: str, model: DiffusionLM, graph: DraftGraph, texts: Sequence[str], count: bool
) -> Line:
    """Decode every prompt plainly and with `auto`, in turns first.

    With `count` also with 8 drafts, whose forwards are counted.
    """
    settings = decoding_settings(model, graph)
    set_threads(model, settings, None)
    options = settings.model_dump()
    if count:
        generate(model, texts[0], **options)  # warms up what takes milliseconds
    identical, nfe, positions = True, [0, 0, 0], [0, 0]
    rates: tuple[list[float], list[float]] = [], []
    with progress_bar() as bar:
        for number, text in enumerate(bar.track(texts, description=f"decoding, {name}")):
            ways = (None, graph) if number % 2 else (graph, None)
            outputs = {way is not None: generate(model, text, graph=way, **options) for way in ways}
            plain, ours = outputs[False], outputs[True]
            identical &= plain.token_ids == ours.token_ids
            nfe[0] += plain.stats.nfe
            nfe[1] += ours.stats.nfe
            positions[0] += plain.stats.positions_computed
            positions[1] += ours.stats.positions_computed
            if count:
                fixed = generate(model, text, graph=graph, budget=DRAFTS, **options)
                identical &= plain.token_ids == fixed.token_ids
                nfe[2] += fixed.stats.nfe
            for way, output in zip(rates, (plain, ours), strict=True):
                way.append(len(output.token_ids) / output.stats.seconds)
    return Line(
        name,
        settings.cache,
        identical,
        (nfe[0], nfe[1], nfe[2]),
        positions[1] / positions[0],
        (median(rates[0]), median(rates[1])),
        median(ours / plain for plain, ours in zip(*rates, strict=True)),
    )


def table(lines: Sequence[Line], prompts: int) -> Table:
    """One row per model, best first."""
    title = f"{prompts} word problems that neither training nor calibration saw"
    shown = Table(title=title, box=None, pad_edge=False, title_justify="left")
    shown.add_column("model (cache)", no_wrap=True)
    shown.add_column("tokens", no_wrap=True)
    shown.add_column("NFE, fewer", justify="right", no_wrap=True)
    shown.add_column("positions", justify="right", no_wrap=True)
    shown.add_column("tokens/s, auto", justify="right", no_wrap=True)
    for line in sorted(lines, key=lambda line: -line.ratio):
        plain, ours, _ = line.nfe
        shown.add_row(
            f"{line.name} ({line.cache})",
            "same" if line.identical else "DIFFER",
            f"{plain} -> {ours} ({plain / ours:.2f}x)",
            f"{line.positions:.2f}x",
            f"{line.speeds[0]:.0f} -> {line.speeds[1]:.0f} ({line.ratio:.2f}x)",
        )
    return shown


def main() -> int:
    """Print the table; exit code 1 if a token differs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prompts", type=at_least(1), default=8)
    parser.add_argument("--calibrate", type=at_least(1), default=20, help="prompts to calibrate on")
    parser.add_argument("--out", type=Path, default=Path("out"), help="where graphs are written")
    parser.add_argument("--small", action="store_true", help=f"leave the shape of {SHAPE} out")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    texts = load_prompts("synthetic", args.prompts, split="test").texts
    began, lines = perf_counter(), []
    for name, cache in CASES:
        with log.status(f"calibrating {name} on {args.calibrate} prompts"):
            model = load_model(name, device="cpu", dtype="float32")
            graph = calibrated(model, cache, args.calibrate)
            graph.save(args.out / f"{name}.json")
        with forgetting_costs():
            lines.append(race(name, model, graph, texts, count=True))
    console.print(table(lines, len(texts)))
    best = max(lines, key=lambda line: line.nfe[0] / line.nfe[2])
    console.print(
        f"Here computing limits, and auto drafts as much as pays. A device that waits for memory "
        f"gains forwards: with {DRAFTS} drafts {best.name} needs {best.nfe[0] / best.nfe[2]:.2f}x "
        "fewer.",
        soft_wrap=True,
    )
    if not args.small:
        few = texts[: 1 if perf_counter() - began > SLOW else 2]
        with log.status(f"growing tiny-sdar into the shape of {SHAPE}"):
            # What a real model had better run in.
            dtype = "bfloat16" if multiplies_bfloat16() else "float32"
            tiny = load_model("tiny-sdar", device="cpu", dtype=dtype)
            graph = DraftGraph.load(args.out / "tiny-sdar.json")
            large = grow(tiny, SHAPE)
            grown = grow_graph(graph, tiny, large)
            set_threads(large, decoding_settings(large, grown), None)
            prepack_if_faster(large)  # as the commands do, with as many threads as decode
        with forgetting_costs():
            line = race(f"{SHAPE} shape", large, grown, few, count=False)
        console.print(
            f"At the size of {SHAPE} (tiny-sdar grown, {dtype}, prompts: {len(few)}): "
            f"{line.speeds[0]:.2f} -> {line.speeds[1]:.2f} tokens/s ({line.ratio:.2f}x), "
            f"NFE {line.nfe[0]} -> {line.nfe[1]} over {line.positions:.2f}x the positions, "
            f"tokens identical: {'yes' if line.identical else 'NO'}",
            soft_wrap=True,
        )
        if dtype == "float32":  # in bfloat16 near-ties can be decided otherwise
            lines.append(line)
    console.print(
        f"To step through a decode in the browser: .venv/bin/spiffy-bench --graph "
        f"{args.out}/tiny-sdar.json --samples 4 --repeats 1 --methods graph,auto --budgets 8 "
        f"--out {args.out}, then open {args.out}/report.html",
        soft_wrap=True,
    )
    return int(not all(line.identical for line in lines))


if __name__ == "__main__":
    start(main)
