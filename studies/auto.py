"""Time `--budget auto` against plain decoding, prompt by prompt: about 15 minutes on a CPU.

Part of `make results`; the table is in docs/results-time.md.

Every tiny model is calibrated on generated problems and decodes others, plainly and with the
drafts that should pay on this machine, and plainly once more, each three times a race. A decode
right after a heavy one is slower by some percent: in a race each way comes once right after each,
itself too, in an order drawn anew, so that this, and whatever else the machine does, hits all
alike. Every prompt counts with the median of its races' ratios, plain decoding's median (the mean
of its two) over ours. What plain decoding seems to gain over itself says how much of a ratio is
chance. `auto` starts knowing nothing, and learning counts.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import median

from spiffy.cli.threads import set_threads, usable_cpus, wait_passively

wait_passively()  # as the commands do, before torch is imported

# ruff: noqa: E402
from fresh import forgetting_costs
from losslessness import POLICIES
from pages import add_into, at_least, command, expect, fill, load_average, machine, start, whole
from rich.progress import track

from spiffy.calib.pipeline import build_graph, prepare, record
from spiffy.calib.prompts import load_prompts
from spiffy.calib.synthetic import problems
from spiffy.runtime import DiffusionLM, decoding_settings, load_model
from spiffy.runtime.budget.auto import auto_budget
from spiffy.runtime.decode import Adviser, make_task, run
from spiffy.runtime.generate import Output, collect
from spiffy.schemas import CacheName, DecodingSettings, PolicyName

CASES: tuple[tuple[str, CacheName], ...] = (
    ("tiny-llada", "none"),
    ("tiny-llada", "dual"),
    ("tiny-dream", "dual"),
    ("tiny-sdar", "block"),
)
BUDGET = 16
OURS = 1  # of the ways of a race: plain, ours, plain again
#: Three ways, each once after each and after itself, if it goes round.
CYCLE = (0, 0, 1, 0, 2, 1, 1, 2, 2)


@dataclass(frozen=True)
class Row:
    """One model and policy; plain seconds over ours, and over plain ones, one per prompt."""

    model: str
    cache: str
    policy: str
    used: Counter[str]
    ratios: list[float]
    chance: list[float]
    fewer: float
    differing: int


def decode(
    model: DiffusionLM, settings: DecodingSettings, question: str, adviser: Adviser | None
) -> Output:
    """Decode one question."""
    task = make_task(model, question, settings)
    task.adviser = adviser
    for _ in run(model, [task]):
        pass
    return collect(task)


def measure(name: str, cache: CacheName, policy: PolicyName, args: argparse.Namespace) -> Row:
    """Calibrate, and race auto, which starts knowing nothing, against plain decoding."""
    model = load_model(name, device="cpu", dtype="float32")
    settings = decoding_settings(model, gen_length=args.gen_length, cache=cache, policy=policy)
    set_threads(model, settings, args.threads)
    prompts = load_prompts("synthetic", args.calibrate)
    graph = build_graph(
        model, prompts, settings, record(model, prepare(model, prompts, settings)), BUDGET
    )
    questions = [problem.question for problem in islice(problems("test"), args.samples)]
    adviser = auto_budget(make_task(model, questions[0], settings), graph)
    used: Counter[str] = Counter()
    ratios: list[list[float]] = [[] for _ in questions]
    chance: list[list[float]] = [[] for _ in questions]
    nfe = [0, 0]
    differing = set[int]()
    decode(model, settings, questions[0], None)  # the first one follows a plain one, too
    for repeat in range(args.repeats):
        for k, question in enumerate(questions):
            outputs: tuple[list[Output], ...] = [], [], []
            for way in order(repeat, k):
                advised = adviser if way == OURS else None
                outputs[way].append(decode(model, settings, question, advised))
            plain, ours, again = (
                median(output.stats.seconds for output in decoded) for decoded in outputs
            )
            ratios[k].append((plain + again) / 2 / ours)
            chance[k].append(plain / again)
            for output in outputs[OURS]:
                nfe[0] += outputs[0][0].stats.nfe
                nfe[1] += output.stats.nfe
                used += Counter(output.stats.budgets)
                if output.token_ids != outputs[0][0].token_ids:
                    differing.add(k)
    return Row(
        name,
        cache,
        policy,
        used,
        [median(values) for values in ratios],
        [median(values) for values in chance],
        nfe[0] / nfe[1],
        len(differing),
    )


def order(repeat: int, prompt: int) -> list[int]:
    """The ways of a race: after a plain decode each follows each once, and the last is plain."""
    generator = random.Random(f"{repeat} {prompt}")
    ways = generator.sample(range(3), 3)
    turned = [CYCLE[k:] + CYCLE[:k] for k in range(len(CYCLE))]
    return [ways[k] for k in generator.choice([t for t in turned if ways[t[-1]] == 0])]


def interval(values: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """Bootstrap interval of the median, 95%."""
    generator = random.Random(0)
    medians = sorted(median(generator.choices(values, k=len(values))) for _ in range(draws))
    return medians[draws // 40], medians[-1 - draws // 40]


def _shares(used: Counter[str]) -> str:
    """The three most used choices with their shares of the forwards."""
    return ", ".join(
        f"{name} {count / used.total():.0%}" if 200 * count >= used.total() else f"{name} <1%"
        for name, count in used.most_common(3)
    )


def _ratio(values: Sequence[float]) -> str:
    """The median with its interval, and the least."""
    low, high = interval(values)
    return f"{median(values):.2f}x ({low:.2f} to {high:.2f}) | {min(values):.2f}x"


def table(rows: Sequence[Row], samples: int) -> str:
    """Markdown, one line per model and policy."""
    lines = [
        "| model | cache | policy | forwards by drafts | speedup (95%) | worst prompt "
        "| plain over itself (95%) | worst prompt | fewer NFE | prompts that differ |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        lines.append(
            f"| {row.model} | {row.cache} | {row.policy} | {_shares(row.used)} "
            f"| {_ratio(row.ratios)} | {_ratio(row.chance)} | {row.fewer:.2f}x "
            f"| {row.differing} of {samples} |"
        )
    return "\n".join(lines)


def cases(only: Sequence[str]) -> Iterator[tuple[str, CacheName, PolicyName]]:
    """What is measured."""
    for name, cache in CASES:
        if name in only:
            for policy in POLICIES:
                yield name, cache, policy


def main() -> None:
    """Print the table, or put it into a Markdown file between its markers."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = list(dict.fromkeys(name for name, _ in CASES))
    parser.add_argument("--models", nargs="+", default=names, choices=names)
    parser.add_argument("--samples", type=at_least(1), default=15, help="test problems")
    parser.add_argument("--repeats", type=at_least(1), default=2, help="races per problem")
    parser.add_argument("--calibrate", type=at_least(1), default=30, help="calibration problems")
    parser.add_argument("--gen-length", type=int, default=64)
    parser.add_argument("--threads", type=at_least(1), help="default: as the commands choose them")
    parser.add_argument("--busy", action="store_true", help="beside a process that works")
    add_into(parser)
    args = parser.parse_args()
    key = "auto-busy" if args.busy else "auto"
    whole(parser, args, "models")
    expect(parser, args.into, key)
    load = load_average()
    spin = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if args.busy else None
    try:
        todo = list(cases(args.models))
        rows = []
        for case in track(todo, description="racing"):
            with forgetting_costs():
                rows.append(measure(*case, args))
            print("\n".join(table(rows[-1:], args.samples).splitlines()[2:]), flush=True)
    finally:
        if spin is not None:
            spin.kill()
    note = (
        f"`{command(args)}` ({args.samples} generated problems, {args.repeats} races each, of nine "
        f"decodes; against plain decoding; {machine()} at the end, {usable_cpus()} cores, float32; "
        f"load average {load} at the start, {load_average()} at the end)"
    )
    block = f"{note}\n\n{table(rows, args.samples)}"
    print(f"\n{block}")
    fill(args.into, key, block)


if __name__ == "__main__":
    start(main)
