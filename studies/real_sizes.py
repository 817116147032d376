"""Drafting at real sizes: tiny models grown into real ones' shapes, plain against drafts.

A grown model decodes the tiny model's tokens by the tiny model's states, and a forward costs what
the real model's costs (`spiffy.bench.grow`). So acceptance is the tiny model's, here that of
generated problems which neither training nor calibration saw; times are the real model's on this
machine. The draft graph is calibrated on the tiny model. Ways of decoding take turns prompt by
prompt, in an order drawn anew for each and for each case. A speedup is plain decoding's seconds of
all prompts over ours, both with the median of their repeats, and the least and the most of a single
prompt. Beside each stands what was predicted of it, by costs timed before and after the race (a
virtual machine's speed changes meanwhile), and below them what drafts would bring that always come
true.

    python studies/real_sizes.py --shapes 0.3b,qwen3-0.6b --models tiny-sdar --blocks 4,8
    python studies/real_sizes.py --shapes 0.3b --weights disk --prompts 1 --budgets 2,8
    python studies/real_sizes.py --shapes llada-8b --models tiny-llada --dtypes bfloat16   # a GPU

With `--weights disk` the layers come from disk for every forward (accelerate's offload), the pages
that the system has cached of them dropped before; embedding and head stay in memory.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any
from zlib import crc32

from spiffy.cli.threads import wait_passively

wait_passively()  # as the commands do, before torch is imported

# ruff: noqa: E402
import torch
from accelerate import dispatch_model
from fresh import forgetting_costs
from losslessness import decode_all
from pages import (
    add_into,
    at_least,
    command,
    expect,
    fill,
    load_average,
    machine,
    numbers,
    start,
    words,
)
from rich.console import Console

from spiffy.bench.grow import SHAPES, grow, grow_graph
from spiffy.bench.measure import Row, measure, results
from spiffy.bench.methods import Method, methods
from spiffy.calib.measure import measure_steps
from spiffy.calib.pipeline import build_graph, prepare, record
from spiffy.calib.prompts import load_prompts
from spiffy.calib.synthetic import problems
from spiffy.runtime import BlockEdges, DiffusionLM, decoding_settings, load_model
from spiffy.runtime.budget.cost import device_name, measure_cost
from spiffy.runtime.budget.predict import plan_of, steps_by_drafts
from spiffy.runtime.decode import make_task
from spiffy.runtime.draft import Selection, graph_drafter
from spiffy.runtime.models.prepack import prepack_if_faster
from spiffy.schemas import (
    CacheName,
    CostProfile,
    DecodingSettings,
    DraftGraph,
    PolicyName,
    SpiffyError,
)
from spiffy.schemas.bench import MethodKind, Result

NODES = 16  # of the calibrated graphs
CACHE: dict[str, CacheName] = {"tiny-llada": "dual", "tiny-dream": "dual", "tiny-sdar": "block"}
log = Console(stderr=True, highlight=False, markup=False)


@dataclass(frozen=True)
class Case:
    """One model on one machine; `weights` lie in "memory" or on "disk"."""

    model: str
    shape: str
    block: int
    dtype: str
    weights: str
    policy: PolicyName


@dataclass(frozen=True)
class Line:
    """One way of decoding.

    Attributes
    ----------
    where
        The machine's part that ran it.
    kernels
        See `DiffusionLM.kernels`.
    seconds
        Of every prompt, plain and in this way: medians over repeats.
    of_tiny
        Answers that are not the tiny model's.
    predicted
        Speedup by held-out steps per forward and costs timed before and after the race; None where
        there is none.
    """

    case: Case
    where: str
    kernels: str
    cache: str
    parameters: int
    prompts: int
    result: Result
    seconds: tuple[tuple[float, float], ...]
    of_tiny: int
    predicted: float | None


@cache
def calibrated(
    name: str, block: int, policy: PolicyName, prompts: int, gen_length: int
) -> DraftGraph:
    """A draft graph of a tiny model, measured on held-out prompts as `spiffy-calibrate` does."""
    model = load_model(name, device="cpu", dtype="float32")
    drawn = load_prompts("synthetic", prompts)
    settings = decoding_settings(
        model, gen_length=gen_length, block_length=block, cache=CACHE[name], policy=policy
    )
    tasks = prepare(model, drawn, settings)
    traces = record(model, tasks)
    return measure_steps(build_graph(model, drawn, settings, traces, NODES), tasks, traces)


def ways(
    model: DiffusionLM,
    settings: DecodingSettings,
    graph: DraftGraph,
    args: argparse.Namespace,
    questions: Sequence[str],
) -> list[Method]:
    """Plain decoding, fixed budgets, auto, and the bound: drafts that are always right."""
    kinds: tuple[MethodKind, ...] = (drafting(graph), "auto")
    found = methods(model, settings, graph, kinds, args.budgets, prompts=questions)
    return found + methods(model, settings, graph, ("perfect",), args.perfect)[1:]


def drafting(graph: DraftGraph) -> Selection:
    """Who drafts where numbers of drafts are fixed."""
    return "graph" if graph.acceptance is None else "model"


def costs(
    model: DiffusionLM,
    settings: DecodingSettings,
    graph: DraftGraph,
    args: argparse.Namespace,
    question: str,
) -> CostProfile:
    """What forwards take now."""
    way = drafting(graph)
    drafters = {way: lambda n: graph_drafter(model, graph, settings, n, way)}
    task = make_task(model, question, settings)
    return measure_cost(task, max(args.budgets), drafters, args.timing / 2)


def predicted(result: Result, graph: DraftGraph, profiles: Sequence[CostProfile]) -> float | None:
    """The speedup that was to be expected: the geometric mean by costs at several times."""
    timed = min(profile.points[-1].drafts for profile in profiles)
    # What auto chose most often says little of a short decode in which it tried many numbers.
    if result.budget is None or result.kind in ("auto", "perfect") or result.budget > timed:
        return None
    way = drafting(graph)
    points = steps_by_drafts(graph)[way]
    plans = (plan_of(points, profile, way, result.budget) for profile in profiles)
    return geometric_mean(plan.speedup for plan in plans)


def run(case: Case, args: argparse.Namespace) -> list[Line]:
    """Grow, check the tokens against the tiny model's, and race."""
    graph = calibrated(case.model, case.block, case.policy, args.calibrate, args.gen_length)
    tiny = load_model(case.model, device=args.device, dtype=case.dtype)
    grown = grow(tiny, case.shape)
    if case.weights == "disk":  # costs are remembered by fingerprint: not those in memory
        grown.fingerprint += " streamed"
    elif not args.no_prepack:  # as the commands do
        prepack_if_faster(grown)
    parameters = sum(weight.numel() for weight in grown.module.parameters())
    artifact = grow_graph(graph, tiny, grown)
    settings = decoding_settings(grown, artifact)
    questions = [problem.question for problem in islice(problems("test"), args.prompts)]
    expected = [out.text for out in decode_all(tiny, settings, questions, None, BlockEdges())]
    with streamed(grown, args.offload) if case.weights == "disk" else nullcontext():
        facts = (grown, settings, artifact, args)
        found = ways(*facts, questions)
        before = costs(*facts, questions[0])
        measured = measure(
            grown,
            found,
            questions,
            records=[{} for _ in questions],
            repeats=args.repeats,
            warm_up=0,
            seed=crc32(repr(case).encode()),  # of the order: with few prompts one is no chance
        )
        after = costs(*facts, questions[0])
    plain = seconds(measured.rows, found[0].name)
    return [
        Line(
            case,
            where(grown),
            grown.kernels,
            settings.cache,
            parameters,
            len(questions),
            result,
            tuple(zip(plain, seconds(measured.rows, result.name), strict=True)),
            sum(
                row.text != expected[row.prompt]
                for row in measured.rows
                if (row.method, row.repeat) == (result.name, 0)
            ),
            predicted(result, artifact, (before, after)),
        )
        for result in results(found, measured)
    ]


def seconds(rows: Sequence[Row], method: str) -> list[float]:
    """Of every prompt: the median over its repeats."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if row.method == method:
            found.setdefault(row.prompt, []).append(row.seconds)
    return [median(found[prompt]) for prompt in sorted(found)]


def where(model: DiffusionLM) -> str:
    """The machine's part that ran it."""
    name, threads = device_name(model.device), torch.get_num_threads()
    return f"{name}, {threads} thread{'s' * (threads > 1)}" if model.device.type == "cpu" else name


@contextmanager
def streamed(model: DiffusionLM, folder: Path | None) -> Iterator[None]:
    """The layers' weights on disk, read by every forward."""
    module: Any = model.module
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        device = str(model.device)
        places = {"model.layers": "disk"}
        places |= dict.fromkeys(
            ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), device
        )
        dispatch_model(module, places, main_device=device, offload_dir=scratch)
        files = list(Path(scratch).glob("*.dat"))
        for file in files:  # only what has reached the disk can be dropped
            with file.open("rb") as opened:
                os.fsync(opened.fileno())

        def drop(*_: object) -> None:
            for file in files:
                with file.open("rb") as opened:
                    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

        module.model.register_forward_pre_hook(drop)
        yield


def table(lines: Sequence[Line]) -> str:
    """Markdown: a table per case; of each plain decoding first, then fixed budgets and auto.

    Seconds are medians over repeats and means over prompts, counts sums over prompts.
    """
    found = []
    for case in dict.fromkeys(line.case for line in lines):
        ours = [line for line in lines if line.case == case]
        found += [_heading(ours[0]), "", *_HEADS, *map(_row, ours), ""]
    return "\n".join(found).rstrip()


_HEADS = (
    "| | ms per forward | s per prompt | NFE | positions | speedup by all seconds | predicted "
    "| differ (plain, tiny) |",
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
)


def _heading(line: Line) -> str:
    case = line.case
    lie = {"memory": "in memory", "disk": "streamed from disk"}[case.weights]
    return (
        f"**{case.model} in the shape {case.shape}** ({line.parameters / 1e6:,.0f}M parameters, "
        f"{line.kernels}, {lie}): block {case.block}, cache {line.cache}, {case.policy}; "
        f"{line.where}"
    )


def _row(line: Line) -> str:
    result = line.result
    way = result.name
    if result.kind not in ("plain", "auto"):
        perfect = "perfect " * (result.kind == "perfect")
        way = f"{result.budget} {perfect}draft{'s' * (result.budget != 1)}"
    cells = (
        f"{way} ({result.note})" if result.note else way,
        f"{1000 * result.seconds.forward / result.nfe:.0f}",
        f"{sum(ours for _, ours in line.seconds) / line.prompts:.2f}",
        str(result.nfe),
        str(result.positions_computed),
        speedup(line.seconds),
        "" if line.predicted is None else f"{line.predicted:.2f}x",
        f"{result.differing}, {line.of_tiny} of {line.prompts}",
    )
    return f"| {' | '.join(cells)} |"


def speedup(pairs: Sequence[tuple[float, float]]) -> str:
    """Of seconds, plain and ours by prompt: of all together, and where each prompt lies."""
    total = sum(plain for plain, _ in pairs) / sum(ours for _, ours in pairs)
    each = [plain / ours for plain, ours in pairs]
    spread = f" ({min(each):.2f} to {max(each):.2f})" if len(each) > 1 else ""
    return f"{total:.2f}x{spread}"


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """What is measured, small shapes first as they are given."""
    for shape in args.shapes:
        for name in args.models:
            for block in args.blocks if name == "tiny-sdar" else [32]:
                for dtype in args.dtypes:
                    for weights in args.weights:
                        for policy in args.policies:
                            yield Case(name, shape, block, dtype, weights, policy)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    given = parser.add_argument
    given("--shapes", type=words(*SHAPES), default="0.3b,qwen3-0.6b,qwen3-1.7b")
    given("--models", type=words(*CACHE), default="tiny-sdar,tiny-llada,tiny-dream")
    given("--blocks", type=numbers(), default="4,8", help="of SDAR; others: 32")
    given("--dtypes", type=words("float32", "bfloat16", "float16"), default="float32")
    given("--weights", type=words("memory", "disk"), default="memory", help="memory, disk, or both")
    given("--policies", type=words("static", "threshold"), default="static")
    given("--budgets", type=numbers(most=NODES), default="1,2,4,8")
    given(
        "--timing", type=float, default=20, help="seconds, for predictions: half before, half after"
    )
    given("--perfect", type=numbers(most=NODES), default="4", help="drafts that come true")
    given("--prompts", type=at_least(1), default=2, help="test problems")
    given("--repeats", type=at_least(1), default=2, help="decodes of each in every way")
    given("--calibrate", type=at_least(1), default=30, help="calibration problems")
    given("--gen-length", type=at_least(1), default=64)
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--threads", type=at_least(1), default=torch.get_num_threads(), help="of a CPU"
    )
    parser.add_argument("--no-prepack", action="store_true", help="of weights")
    parser.add_argument("--offload", type=Path, help="folder on the disk to stream from")
    parser.add_argument("--key", default="real-sizes", help="markers that the table goes between")
    add_into(parser)
    args = parser.parse_args()
    expect(parser, args.into, args.key)
    return args


def main() -> int:
    """Print the table after every case, and put the last one into Markdown files.

    Returns
    -------
    1 if an answer in float32 is not plain decoding's or not the tiny model's, or no case runs,
    else 0.

    Raises
    ------
    SystemExit
        If there are pages and a case does not run: they would hold some of the table.
    """
    args = arguments()
    torch.set_num_threads(args.threads)
    load = load_average()
    lines: list[Line] = []
    for case in cases(args):
        try:
            with log.status(str(case)), forgetting_costs():
                lines += run(case, args)
        except SpiffyError as misfit:  # such as a shape that does not hold this model
            if args.into:
                raise SystemExit(f"{case}: {misfit}") from None
            log.print(f"left out: {misfit}", soft_wrap=True)
            continue
        note = (
            f"`{command(args)}` ({args.prompts} generated problems, {args.repeats} decodes of each "
            f"in every way; against plain decoding; {machine()}; load average {load} at the start, "
            f"{load_average()} at the end)"
        )
        block = f"{note}\n\n{table(lines)}"
        print(f"\n{block}", flush=True)
    if not lines:
        return 1
    fill(args.into, args.key, block)
    wrong = [line for line in lines if line.case.dtype == "float32"]
    return int(any(line.result.differing or line.of_tiny for line in wrong))


if __name__ == "__main__":
    start(main)
